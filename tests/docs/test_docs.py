"""Check the documentation: code blocks run, flags exist, links resolve."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from chunkllama.cluster.connect import APPLICATION
from chunkllama_server.commands import command_names, run
from chunkllama_server.config.settings import Settings, load_settings
from chunkllama_server.process.engines import replica_application

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md")])
# The changelog names flags of earlier versions.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def named_paths(page: Path) -> set[str]:
    """Return the source files and folders that a page names in backticks."""
    text = page.read_text()
    roots = "api|attention|backends|cache|chunkllama|engine|models|scheduler|server|tests|text"
    files = re.findall(r"`([\w./-]+\.(?:py|cpp|cuh|h|sh|yaml))`", text)
    return {*files, *re.findall(rf"`((?:{roots})/[\w/]*\w)/?`", text)}


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: p.name)
def test_named_files_exist(page):
    """A page may shorten a path, such as `scheduler/queue.py`; a how-to page may add `count.py`."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = [f"/{line}" for line in listing.stdout.splitlines()]
    unknown = [
        name
        for name in named_paths(page)
        if not any(f"{path}/".find(f"/{name}/") >= 0 for path in tracked)
        and not name.endswith("count.py")
    ]
    assert not unknown


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


# test_console.py runs those of the README.
PROGRAMS = [page for page in PAGES if blocks(page, "python") and page.name != "README.md"]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda p: p.name)
def test_python_blocks_run(page, served):
    """Runs a page's blocks as one program, against a real server's address."""
    code = "\n".join(blocks(page, "python"))
    code = code.replace("http://127.0.0.1:8000", served.url)
    if "base_url" in code:
        code = re.sub(r'(create\(\n\s*model=)"[\w.-]+"', r'\1"tiny"', code)
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_flag_in_the_docs_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    known = {"--help", "--version"}
    for words in command_names():
        assert run([*words, "--help"]) == 0
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set()
    other_commands = (
        *("docker", "pip ", "pytest", "tests/soak.py", "python benchmarks/"),
        *("-m sglang_router", "-m smg", "ray start", "ray get"),
    )
    for page in CURRENT:
        for line in page.read_text().splitlines():
            if any(word in line for word in other_commands):
                continue
            named |= set(re.findall(r"(?<=[\s`\"])(--[a-z][a-z-]+)", line))
    others = {"--build-arg", "--read-only", "--tmpfs", "--target", "--cpus", "--rm", "--keep"}
    assert not named - known - others


GENERATORS = ["document_commands", "document_configuration", "document_http", "document_models"]


@pytest.mark.parametrize("script", GENERATORS)
def test_a_generated_page_is_current(script):
    spec = importlib.util.spec_from_file_location(script, ROOT / f"scripts/{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), f"run: python scripts/{script}.py"
    if script == "document_configuration":
        assert module.LIMITS_PAGE.read_text() == module.limits_page()


# A tenants file is no settings file; tests/server/test_tenants_file.py loads it.
SETTINGS_FILES = sorted(set(ROOT.glob("configs/*.yaml")) - {ROOT / "configs/tenants.yaml"})


@pytest.mark.parametrize("file", SETTINGS_FILES, ids=lambda p: p.name)
def test_configuration_files_load(file):
    loaded = load_settings({}, {}, file)
    assert str(file) in loaded.origins.values()


def test_public_prefixes_example_is_a_list_of_texts():
    (prefixes,) = blocks(ROOT / "docs/multi-tenant.md", "yaml")
    assert all(isinstance(text, str) for text in yaml.safe_load(prefixes))


def test_deployments_use_keys_that_exist():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    environment = compose["services"]["chunkllama"]["environment"]
    drain = load_settings({}, environment).settings.drain_seconds
    grace = compose["services"]["chunkllama"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > drain
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/chunkllama.yaml").read_text()))
    config = yaml.safe_load(documents[0]["data"]["server.yaml"])
    assert set(config) <= set(Settings.model_fields)
    pod = documents[1]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 10 + config["drain_seconds"]
    (container,) = pod["containers"]
    paths = {
        container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"/health/ready", "/health/live"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config["admin_port"] == ports["admin"]
    monitor = yaml.safe_load((ROOT / "deploy/kubernetes/podmonitor.yaml").read_text())["spec"]
    labels = documents[1]["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "chunkllama"  # the job of ChunkLlamaDown
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == ["admin"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert config["admin_host"] == "0.0.0.0", "the scraper is outside the pod"
    cuda = yaml.safe_load((ROOT / "deploy/compose.cuda.yaml").read_text())["services"]["chunkllama"]
    assert cuda["build"]["target"] == "cuda" and set(cuda) <= set(compose["services"]["chunkllama"])
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    patch = yaml.safe_load((ROOT / "deploy/kubernetes/cuda-patch.yaml").read_text())
    (patched,) = patch["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container["name"] and patched["image"] == cuda["image"]
    assert patched["resources"]["limits"]["nvidia.com/gpu"] == "1"
    unit = (ROOT / "deploy/chunkllama.service").read_text()
    assert "Type=notify" in unit
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > drain


def test_the_manifest_of_a_ray_service_fits_together():
    manifest = (ROOT / "deploy/kubernetes/ray.yaml").read_text()
    found = {each["kind"]: each for each in yaml.safe_load_all(manifest)}
    service = found["RayService"]["spec"]
    front = load_settings(yaml.safe_load(found["ConfigMap"]["data"]["server.yaml"]), {}).settings
    assert front.cluster == f"ray://{found['RayService']['metadata']['name']}-head-svc"
    assert not front.cluster_deploy, "the RayService does"

    serve = yaml.safe_load(service["serveConfigV2"])
    assert serve["proxy_location"] == "Disabled"
    (application,) = serve["applications"]
    assert application["name"] == APPLICATION
    module, _, name = application["import_path"].partition(":")
    assert getattr(import_module(module), name) is replica_application
    engine = load_settings(application["args"], {}).settings
    assert (engine.model, engine.chunk_size) == (front.model, front.chunk_size)

    cluster = service["rayClusterConfig"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = map(Requirement, extras["optional-dependencies"]["ray"])
    assert ray.specifier.contains(cluster["rayVersion"])
    (workers,) = cluster["workerGroupSpecs"]
    bounds = workers["minReplicas"], workers["maxReplicas"]
    assert engine.replica_range == front.replica_range == bounds
    pod = workers["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["cpu"] == str(engine.threads)
    assert "readinessProbe" in worker, "the operator's own needs Serve's proxy"
    assert pod["terminationGracePeriodSeconds"] > engine.drain_seconds

    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > front.drain_seconds
    environment = {each["name"]: each for each in pod["containers"][0]["env"]}
    token = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": token["name"]}
    assert token["key"] == "auth_token", "the one that the operator reads"
    shared = {each["name"]: each["value"] for each in worker["env"]}
    assert all(environment[name]["value"] == value for name, value in shared.items())


def test_the_manifest_of_several_replicas_fits_together():
    manifest = (ROOT / "deploy/kubernetes/routed.yaml").read_text()
    found = {each["kind"]: each for each in yaml.safe_load_all(manifest)}
    config = yaml.safe_load(found["ConfigMap"]["data"]["server.yaml"])
    assert set(config) <= set(Settings.model_fields)
    deployment = found["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert pod["terminationGracePeriodSeconds"] > 10 + config["drain_seconds"]
    (secret,) = [each["secret"] for each in pod["volumes"] if each["name"] == "secret"]
    assert secret["defaultMode"] & 0o027 == 0, "the server refuses a key that others can read"
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "secret"]
    assert Path(config["namespace_secret_file"]).parent == Path(mount["mountPath"])
    pool, scaler = found["InferencePool"]["spec"], found["HorizontalPodAutoscaler"]["spec"]
    assert pool["selector"]["matchLabels"] == labels
    assert [port["number"] for port in pool["targetPorts"]] == [ports["http"]]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "applying it again would undo the autoscaler"
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in (ROOT / "docs/operation.md").read_text()


def test_the_image_copies_what_the_wheel_is_built_from():
    """Each path that a stage copies exists and passes .dockerignore; stages are defined first."""
    text = (ROOT / "Dockerfile").read_text()
    passed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied: set[str] = set()
    stages: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            assert match[1] == "${BASE_IMAGE}" or match[1] in stages
            stages.append(match[2])
        elif match := re.match(r"COPY --from=(\S+)", line):
            assert match[1] in stages
        elif line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    assert all((ROOT / name).exists() for name in copied)
    assert copied == passed
    layers = re.findall(r"^COPY --from=(\S+)", text.split("AS cpu", 1)[1], re.MULTILINE)
    assert layers == ["dependencies-cpu", "model", "project"]  # what changes most comes last


@pytest.mark.parametrize("name", ["stream_chat", "many_tenants"])
def test_client_examples_run(name, served):
    done = subprocess.run(
        [sys.executable, ROOT / f"examples/{name}.py", served.url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers = [int(n) for n in re.findall(r"(\d+) (?:of|prompt|computed)", done.stdout)]
    assert numbers
    if name == "many_tenants":
        sent, computed = numbers
        assert computed < sent / 4


def test_the_offline_example_runs(tiny_model):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/offline_chat.py", str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ tokens cached", done.stdout)]
    assert len(cached) == 3 and cached[0] == 0 and min(cached[1:]) >= 64


def test_the_architecture_names_every_package_and_module():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = set()
    for base in ("chunkllama/", "server/chunkllama_server/"):
        for line in listing.stdout.splitlines():
            if line.startswith(base):
                first, slash, _ = line.removeprefix(base).partition("/")
                names.add(first + slash)
    missing = {name for name in names - {"__init__.py"} if f"{name}`" not in text}
    assert not missing


def test_every_path_is_in_the_documentation(served):
    paths = served.get("/openapi.json").json()["paths"]
    assert len(paths) > 30
    text = "".join(page.read_text() for page in CURRENT)
    stems = {path.partition("{")[0].rstrip("/") for path in paths}
    assert not {stem for stem in stems if f"{stem}`" not in text and f"{stem}/" not in text}


def test_dashboards_and_alerts_name_metrics_that_are_exported(served):
    served.chat(max_tokens=2)
    served.chat(max_tokens=0, n=0)
    exported = set(re.findall(r"^# TYPE (\w+)", served.get("/metrics").text, re.MULTILINE))
    files = [ROOT / "deploy/grafana/chunkllama.json", ROOT / "deploy/prometheus-alerts.yaml"]
    named = {name for file in files for name in re.findall(r"chunkllama_\w+", file.read_text())}
    named |= set(re.findall(r"chunkllama_\w+", (ROOT / "docs/operation.md").read_text()))
    assert len(named) > 15
    unknown = {n for n in named if not {n, n.removesuffix("_bucket"), n + "_total"} & exported}
    assert not unknown


MODELS = ROOT / "chunkllama/models"
EXAMPLES = {
    "Qwen2": "Qwen2ForCausalLM",
    "Granite": "GraniteForCausalLM",
    "Phi-3": "Phi3ForCausalLM",
}


def test_the_example_diffs_of_an_architecture_are_the_code():
    page = (ROOT / "docs/contributing/model.md").read_text()
    code = (MODELS / "architectures.py").read_text().splitlines()
    diffs = []
    for diff in re.findall(r"^ *```diff\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL):
        added = [line.lstrip()[1:] for line in diff.splitlines() if line.lstrip().startswith("+")]
        diffs.append([line for line in added if line])
    table = re.findall(r"^\| (Qwen2|Granite|Phi-3) \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, _ in table] == [*EXAMPLES]
    functions, entries = functions_of_models(), entries_of_architectures()
    used = {name: reached(names, functions) for name, names in entries.items()}
    for added, (family, row) in zip(diffs, table, strict=True):
        own, parts, total, aim = (cell.strip() for cell in row.split("|"))
        named = re.findall(r"`(?:ConfigFile\.)?(\w+)`", parts)
        num_parts = int(parts.split(":")[0])
        assert set(added) <= set(code) and len(added) == int(own)
        assert not named or sum(functions[name][0] for name in named) == num_parts
        assert int(own) + num_parts == int(total) <= int(aim)
        # What the family alone uses is in the diff or named; others share the rest.
        for name in used[EXAMPLES[family]]:
            is_counted = name in named or any(f"def {name}(" in line for line in added)
            assert is_counted or sum(name in names for names in used.values()) > 1, name


def functions_of_models() -> dict[str, tuple[int, set[str]]]:
    """Of each function that reads config.json: its lines without blank ones, and names in it."""
    found = {}
    for path in ("architectures.py", "config_file.py", "rope_config.py"):
        source = (MODELS / path).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                found[node.name] = (sum(bool(line.strip()) for line in lines), names_in(node))
    return found


def entries_of_architectures() -> dict[str, set[str]]:
    """The names in each entry of ``ARCHITECTURES``."""
    tree = ast.parse((MODELS / "architectures.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and names_in(node.target) == {"ARCHITECTURES"}
    )
    assert isinstance(table, ast.Dict)
    keys = [ast.literal_eval(key) for key in table.keys if key is not None]
    return dict(zip(keys, map(names_in, table.values), strict=True))


def names_in(node: ast.AST) -> set[str]:
    nodes = [*ast.walk(node)]
    names = {inner.id for inner in nodes if isinstance(inner, ast.Name)}
    return names | {inner.attr for inner in nodes if isinstance(inner, ast.Attribute)}


def reached(names: set[str], functions: dict[str, tuple[int, set[str]]]) -> set[str]:
    """The functions that some names lead to."""
    found: set[str] = set()
    pending = [*names]
    while pending:
        name = pending.pop()
        if name in functions and name not in found:
            found.add(name)
            pending += functions[name][1]
    return found
