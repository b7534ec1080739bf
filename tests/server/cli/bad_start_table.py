"""Starts of ``chunkllama serve`` that must be refused: one line that names the fix, exit code 2.

``test_bad_starts.py`` runs them, ``benchmarks/bad_starts.py`` records how long each takes.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"
LOGIN = "<!DOCTYPE html>\n<html><title>Sign in</title></html>\n"
HOSTILE = "{{ ''.__class__.__mro__ }}"
ADAPTER = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "peft_type": "LORA"}


@dataclass
class Machine:
    """Where a start takes place.

    Attributes:
        model: a complete model folder that belongs to this start alone.
        folder: an empty folder.
        resources: closed when the start is over.
    """

    model: Path
    folder: Path
    resources: ExitStack
    environment: dict[str, str] = field(default_factory=dict)

    def file(self, text: str, name: str = "file") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def bytes(self, content: bytes) -> Path:
        path = self.folder / "bytes"
        path.write_bytes(content)
        return path

    def taken_port(self) -> int:
        sock = self.resources.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        return sock.getsockname()[1]

    def edit(self, name: str, **changes: object) -> Path:
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path


@dataclass(frozen=True)
class BadStart:
    """A start and what its line must say.

    Attributes:
        arguments: of ``chunkllama serve``; makes what they name.
        pattern: regular expression for the line.
        needs_tokenizer: it is found by the text side, beside the engine's start.
    """

    name: str
    arguments: Callable[[Machine], list[object]]
    pattern: str
    needs_tokenizer: bool = False


def _flags(name: str, words: str, pattern: str) -> BadStart:
    return BadStart(name, lambda _: list(words.split()), pattern)


def _model(
    name: str, change: Callable[[Machine], object], pattern: str, needs_tokenizer: bool = False
) -> BadStart:
    """A start with a changed copy of a good model's folder, or what ``change`` returns."""

    def arguments(machine: Machine) -> list[object]:
        changed = change(machine)
        model = changed if isinstance(changed, Path) else machine.model
        return ["--model", model, "--port", 0]

    return BadStart(name, arguments, pattern, needs_tokenizer)


def _with(name: str, words: str, pattern: str, needs_tokenizer: bool = False) -> BadStart:
    """A start with a good model and flags of the engine."""

    def arguments(machine: Machine) -> list[object]:
        return ["--model", machine.model, "--port", 0, *words.split()]

    return BadStart(name, arguments, pattern, needs_tokenizer)


def _file(
    name: str, flag: str, text: str, pattern: str, needs_tokenizer: bool = False, more: str = ""
) -> BadStart:
    """A start with a good model and a file that a flag names."""

    def arguments(machine: Machine) -> list[object]:
        path = machine.file(text)
        return ["--model", machine.model, "--port", 0, flag, path, *more.split()]

    return BadStart(name, arguments, pattern, needs_tokenizer)


def _variable(name: str, key: str, value: str, pattern: str) -> BadStart:
    def arguments(machine: Machine) -> list[object]:
        machine.environment[key] = value
        return []

    return BadStart(name, arguments, pattern)


def _put(name: str, text: str) -> Callable[[Machine], None]:
    def change(machine: Machine) -> None:
        (machine.model / name).write_text(text)

    return change


def _cut(machine: Machine) -> None:
    weights = machine.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickled(machine: Machine) -> None:
    (machine.model / "model.safetensors").rename(machine.model / "pytorch_model.bin")


def _missing_shard(machine: Machine) -> None:
    (machine.model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (machine.model / "model.safetensors.index.json").write_text(json.dumps(index))


def _huge(machine: Machine) -> None:
    """Weights of 4 TiB in a file without blocks on the disk."""
    config = {"hidden_size": 1 << 20, "intermediate_size": 128, "vocab_size": 1 << 20}
    machine.edit("config.json", **config, num_hidden_layers=1, num_attention_heads=1 << 14)
    machine.edit("config.json", num_key_value_heads=1, head_dim=64, torch_dtype="bfloat16")
    from chunkllama.models.config import read_spec
    from chunkllama.models.tensors import expected_shapes

    header, at = {}, 0
    for name, shape in expected_shapes(read_spec(machine.model)):
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (machine.model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def _empty_folder(machine: Machine) -> Path:
    return machine.folder


def _adapter(machine: Machine) -> Path:
    machine.file(json.dumps(ADAPTER), "adapter_config.json")
    return machine.file("", "adapter_model.safetensors").parent


def _gguf(text: str) -> Callable[[Machine], Path]:
    return lambda machine: machine.file(text, "model.gguf")


def _gguf_file(machine: Machine, name: str, key: bytes, value: bytes) -> Path:
    """A sound GGUF file with one key, whose value is given with its type, and no tensor."""
    text = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key + value
    path = machine.folder / name
    path.write_bytes(text)
    return path


def _unknown_gguf(machine: Machine) -> Path:
    """Of an architecture that is not a decoder of text."""
    value = struct.pack("<IQ", 8, 4) + b"clip"
    return _gguf_file(machine, "clip.gguf", b"general.architecture", value)


def _late_gguf(machine: Machine) -> Path:
    path = machine.folder / "late.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 99, 0, 0))
    return path


def _part_of_gguf(machine: Machine) -> Path:
    """The second of three files that llama-gguf-split has written."""
    value = struct.pack("<IH", 2, 3)
    return _gguf_file(machine, "model-00002-of-00003.gguf", b"split.count", value)


def _folder_of_gguf(machine: Machine) -> Path:
    return machine.file("GGUF", "weights/a.Q4_0.gguf").parent


def _hub_cache(machine: Machine) -> Path:
    machine.file("{}", "models--a--b/snapshots/0123/config.json")
    return machine.folder / "models--a--b"


def _outer_folder(machine: Machine) -> Path:
    machine.file("{}", "downloads/model/config.json")
    return machine.folder / "downloads"


def _meta_layout(machine: Machine) -> Path:
    return machine.file("{}", "llama/params.json").parent


def _broken_link(machine: Machine) -> None:
    """As a cache of the hub has it where a download was cut."""
    weights = machine.model / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/0123")


def _escaping_index(machine: Machine) -> None:
    (machine.model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../x.safetensors"}}
    (machine.model / "model.safetensors.index.json").write_text(json.dumps(index))


def _index(value: object) -> Callable[[Machine], None]:
    def change(machine: Machine) -> None:
        (machine.model / "model.safetensors").unlink()
        (machine.model / "model.safetensors.index.json").write_text(json.dumps(value))

    return change


def _folder_for(name: str) -> Callable[[Machine], None]:
    def change(machine: Machine) -> None:
        (machine.model / name).unlink()
        (machine.model / name).mkdir()

    return change


def _larger_vocabulary(machine: Machine) -> None:
    tokenizer = json.loads((machine.model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 5000
    (machine.model / "tokenizer.json").write_text(json.dumps(tokenizer))


def _value(**changes: object) -> Callable[[Machine], None]:
    return lambda machine: machine.edit("config.json", **changes) and None


def _without(name: str) -> Callable[[Machine], None]:
    return lambda machine: (machine.model / name).unlink()


FLAGS = [
    _flags("unknown flag", "--num-chunk 3", "--num-chunk.*--num-chunks"),
    _flags("unknown short flag", "-m model", "-m"),
    _flags("missing value", "--port", "--port.*requires an argument"),
    _flags("extra word", "a b", r"unexpected extra argument.*\(b\)"),
    _flags("model twice", "a --model b", "model: given twice, as a and as --model b"),
    _flags("value of a switch", "--standby true", "model: true is none; a switch takes no value"),
    _flags("size in two words", "--kv-cache-memory 4 GB", "model: GB: no such folder or file"),
    _flags(
        "flags of vLLM",
        "a/b --block-size 16 --enable-chunked-prefill --enforce_eager",
        "--block-size here, use --chunk-size; .*-prefill here, leave.*; no option --enforce-eag",
    ),
    _flags(
        "flags of llama.cpp",
        "-m x -ngl 99 -c 4096",
        "-m here, use --model; no option -ngl here, .*; no option -c here, use --max-model-len",
    ),
    _flags("flag of SGLang", "--model-path=x", "no option --model-path here, use --model"),
    _flags("quantization of a checkpoint", "--quantization awq", "quantization: leave it out: how"),
    _flags("share of memory", "--kv-cache-memory 50%", "kv_cache_memory: .*such as 512MiB.*'50%'"),
    _flags(
        "percent of a GPU", "--gpu-memory-utilization 90", "utilization: .*equal to 1, got '90'"
    ),
    _flags(
        "processors", "--cpu-bind 0-", "cpu_bind: write it like 0-3,8 or auto or none, got '0-'"
    ),
    _flags("part of a thread", "--threads 0.5", "threads: .*integer.*'0.5'"),
    _flags("empty text", "--port=", r"port: empty \(from command line\); leave it out"),
    _flags("no file of settings", "--config=", "config: empty.*name a YAML file"),
    _flags("another parser", "--tool-call-parser llama4", "tool_call_parser: .*'hermes'.*'llama4'"),
    _flags("replicas in reverse", "--cluster auto --replicas 3..1", "replicas must be .*LOW..HIGH"),
    _flags(
        "caches over a port", "--kv-events-endpoint tcp://h", "kv_events_.*like tcp://127.0.0.1:"
    ),
    _flags("text for a count", "--num-chunks many", r"num_chunks: .*integer.*of chunks.*'many'"),
    _flags("zero chunks", "--num-chunks 0", "num_chunks: .*greater than 0 chunks.*'0'"),
    _flags("negative chunks", "--num-chunks -5", "num_chunks: .*greater than 0 chunks.*'-5'"),
    _flags("chunk size", "--chunk-size 48", "chunk_size: .*16, 32, 64 or 128"),
    _flags("dtype", "--dtype fp8", "dtype: .*'bfloat16'.*'fp8'"),
    _flags("port too high", "--port 70000", "port: .*65535.*'70000'"),
    _flags("port negative", "--port -1", "port: .*greater than or equal to 0.*'-1'"),
    _flags("backend", "--backend tpu", "backend: .*'reference', 'cpu' or 'cuda'.*'tpu'"),
    _flags("device", "--device gpu", "device: .*'cpu', 'cuda'.*'gpu'"),
    _flags("quantization", "--quantization q4", "quantization: .*'int8' or 'int4'.*'q4'"),
    _flags("instruction set", "--isa-level sse", "isa_level: .*'avx2'.*'sse'"),
    _flags("size without number", "--kv-cache-memory lots", "kv_cache_memory: .*512MiB.*'lots'"),
    _flags("size of zero", "--kv-cache-memory 0", "kv_cache_memory: .*greater than 0 bytes"),
    _flags("unit for seconds", "--drain-seconds 5m", "drain_seconds: .*of seconds.*'5m'"),
    _flags("no seconds", "--engine-hang-seconds 0", "engine_hang_seconds: .*than 0 seconds"),
    _flags("too many sequences", "--max-num-seqs 2000", "max_num_seqs: .*1,?024 sequences"),
    _flags("no context", "--max-model-len 0", "max_model_len: .*greater than 0.*'0'"),
    _flags("no threads", "--threads 0", "threads: .*greater than 0.*'0'"),
    _flags("share of zero", "--row-work-share 0", "row_work_share: .*than 0 of the model's time"),
    _flags("slowdown", "--max-tenant-slowdown 0.5", "max_tenant_slowdown: must be at least 1"),
    _flags("tenant weight", "--tenant-weights alice=many", "tenant_weights: .*'alice=many'"),
    _flags("one tag", "--reasoning-tags a", "reasoning_tags must be auto, none, or two tags"),
    _flags("log level", "--log-level loud", "log_level: .*'debug'.*'loud'"),
    _flags("certificate alone", "--ssl-certfile x.pem", "ssl_certfile and ssl_keyfile"),
    _flags("no folder of packs", "--packs nowhere", "packs: nowhere is not a folder"),
    _flags("no public key", "--pack-public-key nowhere", "pack_public_key: nowhere cannot be read"),
    _flags("traces nowhere", "--otlp-endpoint host:4318", "otlp_endpoint: .*http.*'host:4318'"),
    _flags("traces to half a URL", "--otlp-endpoint http://[::1", "otlp_endpoint: .*HOST:PORT"),
    _flags("no number of seconds", "--drain-seconds nan", "drain_seconds: .*finite number.*'nan'"),
    _flags("size too large", "--max-header-bytes 1GiB", "max_header_bytes: .*1048576 bytes"),
    _flags("path of a proxy", "--root-path llm/", "root_path: .*'llm/'"),
    _flags("origin without scheme", "--cors-origins a.example", "cors_origins: write https://HOST"),
    _flags("adapter without folder", "--lora sql", "lora: write name=folder, not 'sql'"),
    _flags("another store", "--response-store mysql://x", "response_store: .*valkey://"),
    _flags("no secret file", "--namespace-secret-file /x", "namespace_secret_file: cannot read /x"),
    _flags("no name of a model", "--model=", "model: empty"),
    _flags("adapter without name", "--lora =x", "lora: write name=folder, not '=x'"),
    _flags("adapter twice", "--lora a=x --lora a=y", "lora: a occurs twice"),
    _flags("replicas alone", "--replicas 3", "replicas: needs cluster"),
    _flags("two flags for one", "--op-set cpu --backend cpu", "op_set.*former name of backend"),
    _variable("unknown variable", "CHUNKLLAMA_NUM_CHUNK", "3", "environment.*num_chunks"),
    _variable("key of an empty variable", "CHUNKLLAMA_API_KEY", "", "api_key: empty .*environment"),
    _variable("address of an empty variable", "CHUNKLLAMA_HOST", "", "host: empty .*environment"),
    _variable("variable's value", "CHUNKLLAMA_PORT", "http", "port: .*'http'.*from environment"),
]
FILES = [
    _flags("no settings file", "--config /nowhere.yaml", "config: cannot read /nowhere.yaml: No"),
    _flags("endless settings", "--config /dev/zero", "config: /dev/zero is larger than 16 MiB"),
    BadStart("settings folder", lambda m: ["--config", m.folder], "config: .*Is a directory"),
    _file("settings not YAML", "--config", "port: [1\n", "file: not valid YAML at line"),
    _file("setting twice", "--config", "port: 1\nport: 2\n", "file: port occurs twice at line 2"),
    _file(
        "long number", "--config", f"port: 1{':00' * 3000}\n", "file: a number of 9001 char.* 1$"
    ),
    _file("settings as a list", "--config", "- port\n", "must hold key: value lines"),
    _file("settings key", "--config", "max_num_seq: 3\n", "file; did you mean max_num_seqs"),
    _file("settings value", "--config", "threads: 0\n", r"threads: .*0.*from .*file\)"),
    _file(
        "settings in sections", "--config", "server:\n  port: 1\n", "server holds keys of its own"
    ),
    _file("dashes in a key", "--config", "num-chunks: 5\n", "num-chunks.*did you mean num_chunks"),
    BadStart(
        "settings in UTF-16",
        lambda m: ["--config", m.bytes("port: 1".encode("utf-16"))],
        "config: cannot read .*: not UTF-8 text",
    ),
    _flags("tenants without keys", "--tenants-file /x", "tenants_file: "),
    _file("public key", "--pack-public-key", "x", "pack_public_key: .*no PEM file of a public key"),
    _flags("no key file", "--api-key-file /nowhere", "api_key_file: cannot read /nowhere: No"),
    _file("key file without keys", "--api-key-file", "# none\n", "api_key_file: .*holds no key"),
    _flags("key twice", "--api-key a:1 --api-key b:1", r"api_key: entry 2 \(b\) repeats"),
    _flags("operator alone", "--operator-key x", "operator_key: needs api_key"),
    _file(
        "tenants not YAML",
        "--tenants-file",
        "a: [",
        "tenants_file: .* at line 1",
        more="--api-key a:1",
    ),
    _flags(
        "certificate", "--ssl-certfile /x.pem --ssl-keyfile /y.pem", "ssl_certfile.*No such file"
    ),
    _file("template syntax", "--chat-template", "{% if %}", "file: .*does not compile", True),
    _file("hostile template", "--chat-template", HOSTILE, "file: .*template", True),
    _with("template as text", "--chat-template {{messages}}", "no file {{messages}}; write", True),
    _with(
        "name of a template", "--chat-template chatml", "no file chatml; write the template", True
    ),
    _with("no template", "--chat-template /nowhere", "chat_template: no file /nowhere", True),
    _file("prefixes", "--public-prefixes", "a: b\n", "file must be a YAML list", True),
]
FOLDERS = [
    _flags("no folder", "--model /no/such/folder", "/no/such/folder: no such folder"),
    _model("a file", lambda m: m.file("x", "model.bin"), "a model is a folder, a .gguf file or a"),
    _model("empty folder", _empty_folder, "empty, no config.json; is it a complete"),
    _model("LoRA adapter", _adapter, r"LoRA adapter.*meta-llama/Llama-3.2-1B.*merge_and_unload"),
    _model("folder of GGUF files", _folder_of_gguf, r"give one of them, such as .*a\.Q4_0\.gguf"),
    _model("hub's cache", _hub_cache, "hub's cache; give .*snapshots/0123"),
    _model("folder above", _outer_folder, "give the folder below it, such as .*downloads/model"),
    _model("Meta's layout", _meta_layout, "Meta's own layout.*Hugging Face"),
    _model("config missing", _without("config.json"), r"config\.json: missing"),
    _model("config cut", _put("config.json", '{"model_type": "lla'), "config.json: not valid JSON"),
    _model("LFS config", _put("config.json", LFS), "config.json: a Git LFS pointer.*git lfs pull"),
    _model(
        "LFS weights", _put("model.safetensors", LFS), "model.safetensors: a Git LFS.*git lfs pull"
    ),
    _model("LFS tokenizer", _put("tokenizer.json", LFS), "tokenizer.json: a Git LFS pointer"),
    _model("LFS GGUF file", _gguf(LFS), "model.gguf: a Git LFS pointer.*git lfs pull"),
    _model("web page", _put("model.safetensors", LOGIN), "a web page.*login"),
    _model("weights cut", _cut, "model.safetensors: corrupt safetensors file.*download it again"),
    _model("no weights", _without("model.safetensors"), "no model.safetensors and no"),
    _model("pickled weights", _pickled, "pytorch_model.bin: pickled.*convert them to safetensors"),
    _model("missing shard", _missing_shard, "model-00001-of-00002.safetensors: missing"),
    _model("encoder", lambda m: m.edit("config.json", architectures=["BertForMaskedLM"]) and None,
           "config.json: unsupported architecture BertForMaskedLM; supported: "),
    _model("other shapes", lambda m: m.edit("config.json", hidden_size=128) and None,
           r"embed_tokens\.weight has shape \[272, 64\], config.json asks for"),
    _model("config a list", _put("config.json", "[]"),
           "config.json: expected a JSON object, got list"),
    _model("size as text", _value(vocab_size="272"),
           "vocab_size must be a positive integer, got '272'"),
    _model("no heads", _value(num_attention_heads=0), "num_attention_heads must be a positive"),
    _model("heads apart", _value(num_key_value_heads=3),
           "4 is no multiple of num_key_value_heads 3"),
    _model("endless layers", _value(num_hidden_layers=10**9),
           "1000000000 layers, the weights hold"),
    _model("epsilon as text", _value(rms_norm_eps="x"), "rms_norm_eps must be a number, got 'x'"),
    _model("rope's base", _value(rope_theta=0), r"rope_theta must be in \[1, 1e\+15\], got 0"),
    _model("rope's type", _value(rope_scaling={"type": "x", "factor": 2}), "rope_type 'x' is not"),
    _model("no positions", _value(max_position_embeddings=0),
           "max_position_embeddings must be a pos"),
    _model("other quantization", _value(quantization_config={"quant_method": "bitsandbytes"}),
           "quant_method 'bitsandbytes' is not supported; use awq, gptq"),
    _model("tokenizer cut", _put("tokenizer.json", '{"version": "1.0"'),
           "tokenizer.json: not valid"),
    _model("tokenizer's web page", _put("tokenizer.json", LOGIN),
           "tokenizer.json: a web page.*login"),
    _model("tokenizer's settings", _put("tokenizer_config.json", "{"),
           "tokenizer_config.json: not v"),
    _model("sampling values", _put("generation_config.json", "{"),
           "generation_config.json: not valid"),
    _model("template of the folder", _put("chat_template.jinja", "{% for %}"),
           "does not compile", True),
    _model("empty weights", _put("model.safetensors", ""), "a header of 0 bytes in a file of 0"),
    _model("broken link", _broken_link,
           "model.safetensors: a link to ../../blobs/0123, which does not"),
    _model("index to elsewhere", _escaping_index, "'../../x.safetensors', not a plain file name"),
    _model("archive", lambda m: m.file("PK", "model.zip"),
           "model.zip: a model is a folder, a .gguf"),
    _model("unknown alias", lambda _: Path("smolm2"), "no known alias .smollm2-135m-instruct"),
    _model("address in the web", lambda _: Path("https:/huggingface.co/a/b"), "no such folder"),
    _model("name of Ollama", lambda _: Path("llama3.2:1b"), "a name of Ollama or llama.cpp"),
    _model("file of the hub", lambda _: Path("a/b-GGUF:Q4_K_M"), "a name of Ollama or llama.cpp"),
    _model("file of weights", lambda m: m.model / "model.safetensors", "give its folder, .*model$"),
    _model("code of the folder", _value(architectures=["XForCausalLM"], model_type="x",
                                        auto_map={"AutoModelForCausalLM": "x.X"}),
           "defined by code of the model's folder .*, which is not executed"),
    _model("attention sinks", _value(architectures=["GptOssForCausalLM"], model_type="gpt_oss"),
           "GptOssForCausalLM cannot run here: its attention has sinks"),
    _model("state of a recurrence", _value(architectures=["MambaForCausalLM"], model_type="mamba"),
           "MambaForCausalLM cannot run here: its layers keep a state"),
    _model("classifier", _value(architectures=["LlamaForSequenceClassification"]),
           "unsupported architecture LlamaForSequenceClassification; supported: decoders"),
    _model("quantized by MLX", _value(quantization_config={"bits": 4}), "no quant_method; use a"),
    _model("index of a list", _index([1]), "expected a JSON object, got list"),
    _model("index without tensors", _index({}), "weight_map is missing or empty"),
    _model("index to a number", _index({"weight_map": {"a": 3}}), "a is in 3, not a plain file"),
    _model("folder for a file", _folder_for("tokenizer.json"), "tokenizer.json: cannot be read"),
    _model("another tokenizer", _larger_vocabulary, "tokenizer has .* tokens and the model", True),
    _model("no tokenizer", _without("tokenizer.json"), "neither tokenizer.json nor", True),
    _model("GGUF of a later version", _late_gguf, "version 99; supported: 2 and 3"),
    _model("not a GGUF file", _gguf("x" * 100), "model.gguf: not a usable GGUF file"),
    _model("short GGUF file", _gguf("GGUF"), "model.gguf: not a GGUF file: shorter than a header"),
    _model("part of a GGUF file", _part_of_gguf, "one of 3 parts .*llama-gguf-split --merge"),
    _model("GGUF of another kind", _unknown_gguf, "clip.gguf.*clip"),
]  # fmt: skip
ENGINE = [
    _with("no GPU", "--device cuda", "device: cuda was asked for, but there is no CUDA device"),
    _with("GPU backend", "--backend cuda", "backend: cuda needs device cuda, not cpu"),
    _with("level elsewhere", "--backend reference --isa-level avx2", "isa_level: avx2 is for the"),
    _with("chunks of 32", "--backend cpu --chunk-size 32", "chunk_size: 32 is not one of 64"),
    _with("int8 elsewhere", "--backend reference --quantization int8", "quantization: int8 is not"),
    _with("long context", "--max-model-len 9999", "max_model_len: 9999 is above .* limit of 1024"),
    _with("too many threads", "--threads 4096", "threads: 4096 are more than the .* processors"),
    _with("no such processor", "--cpu-bind 9999", "cpu_bind: .*not run on processor 9999; it may"),
    _with("three ranks", "--tp 3", "tensor_parallel_size: 3 does not divide the 4 attention heads"),
    _with("ranks and adapters", "--tp 2 --lora a=/x", "lora: adapters need tensor_parallel_size 1"),
    _with("draft alone", "--draft-model x", "draft_model: needs speculation auto, which is off"),
    _with("adapter's parent", "--lora a=/", "lora: a: /adapter_config.json: missing"),
    _with(
        "draft nowhere", "--speculation auto --draft-model /x", "draft_model: .*/x: no such folder"
    ),
    _with("adapter nowhere", "--lora sql=/nowhere", "lora: sql: /nowhere: no such folder"),
    _with("small pool", "--kv-cache-memory 1k", "kv_cache_memory: 1000 bytes hold fewer than two"),
    _with("large pool", "--num-chunks 2000000000", "num_chunks: the pool takes .*MiB"),
    _with("memory of a rack", "--kv-cache-memory 900TiB", "kv_cache_memory: the pool takes .*MiB"),
    _model("large weights", _huge, "model: its weights take .*MiB.*quantization int8 or int4"),
]
PORTS = [
    BadStart("port in use", lambda m: ["--port", m.taken_port()], "port: .*in use.*--port"),
    BadStart(
        "admin port in use",
        lambda m: ["--port", 0, "--admin-port", m.taken_port()],
        "admin_port: .*in use.*--admin-port",
    ),
    _flags("one port for both", "--admin-port 8000", "admin_port must differ from port"),
    _flags(
        "address with a port", "--host localhost:8000", "host: .*; give the address alone.*--port"
    ),
    _flags("address with a scheme", "--host http://0.0.0.0", "host: .*; give the address alone"),
    _flags("unknown host", "--host no.such.host.invalid", "host: no.such.host.invalid cannot be"),
    _flags("foreign address", "--host 192.0.2.1", "port: cannot listen on 192.0.2.1:8000"),
]
BAD_STARTS = [*FLAGS, *FILES, *FOLDERS, *ENGINE, *PORTS]
