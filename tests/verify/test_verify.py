"""``chunkllama verify``: what is equal passes, and what cannot be compared is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from gguf_files import TOKENS, write_gguf
from model_families import SMALL, fill_randomly, random_model
from verify_models import FAST, edit_config, verified, write_model, write_tokenizer

from chunkllama.text.tokenizer import load_tokenizer
from chunkllama.verify.run import Options, verify
from chunkllama.verify.texts import SAMPLES
from chunkllama_server.commands import run


def test_equal_models_pass_on_every_backend(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", "qwen3")
    path = tmp_path / "report.json"
    arguments = ["verify", "--model", str(folder), "--max-tokens", "80", "--json", str(path)]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "equal to transformers" in printed
    report = json.loads(path.read_text())
    assert report["equal"] is True
    assert report["architecture"] == "Qwen3ForCausalLM"
    by_subject = {x["subject"]: x for x in report["findings"] if x["subject"]}
    assert set(by_subject) == {
        "stages",
        *(
            f"{backend}, {dtype}"
            for backend in ("reference", "cpu")
            for dtype in ("float32", "bfloat16")
        ),
        "cpu, bfloat16, int8",
    } - {"stages"}
    for finding in by_subject.values():
        assert {"top1", "kl", "nll", "nll_reference"} <= finding["numbers"].keys()
        assert finding["area"] in printed
    assert by_subject["reference, float32"]["numbers"]["largest_difference"] < 1e-4
    assert by_subject["cpu, bfloat16, int8"]["numbers"]["kl"] > 0


@pytest.mark.parametrize("family", ["gemma3", "granite", "ernie", "hunyuan"])
def test_stages_of_other_families_are_equal(family: str, tmp_path: Path) -> None:
    report = verified(write_model(tmp_path / "model", family))
    assert report.areas == []
    (stages,) = [x for x in report.findings if x.area == "stages"]
    assert int(stages.detail.split()[0]) >= 4 * 7


def test_a_model_that_transformers_runs_is_verified(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mixtral")
    report = verified(folder, quantizations=("auto", "int8"), backends=("cpu",))
    assert report.is_equal
    results = {x.subject or x.area: (x.is_equal, x.detail) for x in report.findings}
    assert results["stages"] == (None, "transformers computes the layers")
    assert results["cpu, float32"][0] is True
    is_equal, reason = results["cpu, bfloat16, int8"]
    assert is_equal is None
    assert "int8 is not available for MixtralForCausalLM" in reason


@pytest.mark.nightly
def test_a_quantized_file_is_verified_as_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels compute with the file's codes; transformers reads the dequantized folder."""
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    model = random_model("Llama", {"vocab_size": len(TOKENS)})
    path = tmp_path / "m.gguf"
    kinds = {"output.weight": "Q8_0", "token_embd.weight": "Q8_0"}
    write_gguf(path, model, lambda name: kinds.get(name, "Q4_0"), bos_token_id=(1,))
    report = verified(path, backends=("reference", "cpu"), quantizations=("auto", "int4"))
    assert report.areas == []
    numbers = {x.subject: x.numbers for x in report.findings}
    assert numbers["reference, float32"]["largest_difference"] < 1e-4
    assert numbers["cpu, float32"]["limit"] == numbers["cpu, bfloat16"]["limit"] < 0.02
    assert 0 < numbers["cpu, bfloat16, int4"]["kl"] < 0.5
    (stages,) = [x for x in report.findings if x.area == "stages"]
    assert int(stages.detail.split()[0]) >= 4 * 7


def test_what_transformers_cannot_read_is_one_line(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", "llama")
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    assert run(["verify", "--model", str(folder)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "transformers cannot load it" in last
    assert "--reference MODEL" in last


def test_missing_weights_are_named_before_anything_is_compared(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    assert run(["verify", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "comparing" not in error
    assert "no model.safetensors and no model.safetensors.index.json" in error.splitlines()[-1]


@pytest.mark.nightly
def test_the_text_model_of_a_multimodal_folder_is_compared_stage_by_stage(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    size = write_tokenizer(folder)
    text = {**SMALL, "vocab_size": size, "num_hidden_layers": 7, "sliding_window": 32}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    fill_randomly(model)
    model.save_pretrained(folder)
    report = verify(Options(str(folder), **FAST))
    assert report.is_equal, report.areas
    stages = next(x for x in report.findings if x.area == "stages")
    assert "stages of 7 layers equal" in stages.detail


def test_a_comparison_of_nothing_is_no_success(tmp_path: Path, capsys) -> None:
    folder = write_model(tmp_path / "model", "narrow")
    path = tmp_path / "report.json"
    arguments = ["verify", "--model", str(folder), "--backends", "cpu", "--json", str(path)]
    assert run([*arguments, "--max-tokens", "20"]) == 1
    assert "no log-probabilities were compared" in capsys.readouterr().out.splitlines()[-1]
    report = json.loads(path.read_text())
    assert (report["equal"], report["areas_that_differ"]) == (False, [])
    assert {x["is_equal"] for x in report["findings"] if x["subject"]} == {None}


def test_a_tokenizer_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    """Its code is not executed, nor is the user asked."""
    folder = write_model(tmp_path / "model", "llama")
    path = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    report = verify(Options(str(folder), **FAST))
    finding = report.findings[0]
    assert (finding.area, finding.is_equal) == ("tokenizer", None)
    assert "transformers cannot read it" in finding.detail
    assert report.is_equal


README_ROWS = {"Qwen3": "qwen3", "Gemma 3": "gemma3"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", README_ROWS)
def test_the_readmes_row_of_random_weights_is_what_verify_finds(name: str, tmp_path: Path) -> None:
    """Up to the order of sums: stages and limits are the same, differences of the same size."""
    folder = write_model(tmp_path / "model", README_ROWS[name])
    report = verified(folder, backends=("cpu",), quantizations=("auto", "int8"), max_tokens=128)
    assert report.is_equal
    found = {x.subject: x.numbers for x in report.findings}
    (stages,) = [x.detail.split()[0] for x in report.findings if x.area == "stages"]
    exact, narrow = found["cpu, float32"], found["cpu, bfloat16"]
    cells = [
        f"{exact['largest_difference']:.2g} ({exact['limit']:.0e})",
        *(f"{x['kl']:.2g} ({x['limit']:.2g})" for x in (narrow, found["cpu, bfloat16, int8"])),
    ]
    row = f"| {name} | {stages} equal | {' | '.join(cells)} |"
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = next(x for x in readme.splitlines() if x.startswith(f"| {name} |"))
    numbers, printed = (re.findall(r"\d[\d.e-]*", x.split("|", 2)[2]) for x in (row, shown))
    assert len(numbers) == len(printed) == 7, row
    for mine, other in zip(map(float, numbers), map(float, printed), strict=True):
        assert other / 4 <= mine <= other * 4, row


def test_a_doubled_bos_is_named(tmp_path: Path, capsys) -> None:
    reference = write_model(tmp_path / "reference", "llama")
    folder = tmp_path / "model"
    shutil.copytree(reference, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    single = document["post_processor"]["single"]
    document["post_processor"]["single"] = [single[0], *single]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    # One of the two is left out where the model is served.
    assert load_tokenizer(folder).encode("a", add_special_tokens=True).count(1) == 1
    assert verified(folder, reference).areas == ["BOS"]
    assert verified(folder).areas == ["BOS"]
    arguments = ["verify", "--model", str(folder), "--reference", str(reference)]
    arguments += ["--max-tokens", "20", "--backends", "reference", "--quantizations", "auto"]
    assert run(arguments) == 1
    assert capsys.readouterr().out.rstrip().endswith("in: BOS")


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    reference = write_model(tmp_path / "reference", "llama")
    folder = tmp_path / "model"
    shutil.copytree(reference, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:-30]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    report = verified(folder, reference)
    assert report.areas[:2] == ["tokenizer", "BOS"]
    assert f"of {len(SAMPLES)} texts differ" in report.findings[0].detail


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backends", "gpu"], "backends: 'gpu' is not one of reference, cpu, cuda"),
        (["--backends", "cpu,cuda"], "backends: cuda is not available here: device: cuda was"),
        (["--quantizations", "int3"], "quantizations: 'int3' is not one of auto"),
        (["--backends", ","], "backends: name at least one"),
        (["--text", "/nonexistent"], "text: cannot read /nonexistent: No such file"),
        (["--model", "/nonexistent"], "no such folder"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments: list[str], words: str, capsys) -> None:
    assert run(["verify", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert "\n" not in printed
