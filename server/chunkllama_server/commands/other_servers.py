"""Flags and commands of other servers, and what serves their purpose here.

Imported only where a command line is refused. The flags are those of vLLM, SGLang, llama.cpp's
server and Text Generation Inference, the commands those of Ollama and of these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_DROP: Final = "leave it out, "
_DIALOGUE: Final = "; /dashboard of the server has a chat box"

# What to do -> flags.
_SERVE: Final = {
    "use --model": "-m --model-path --model-id -hf -hfr --hf-repo",
    "use --max-model-len": "-c --ctx-size --context-length --max-seq-len --max-input-tokens "
    "--max-input-length",
    # The length of one sequence in Text Generation Inference, the pool of all in SGLang.
    "use --max-model-len, or --num-chunks or --kv-cache-memory for the pool": "--max-total-tokens",
    "use --max-num-seqs": "-np --parallel --max-running-requests --max-batch-size",
    "use --max-waiting": "--max-concurrent-requests",
    "use --max-num-batched-tokens": "-b --batch-size -ub --ubatch-size --chunked-prefill-size "
    "--max-prefill-tokens --max-batch-prefill-tokens",
    "use --tensor-parallel-size": "-tp --tp-size --num-shard",
    "use --cluster auto and --replicas": "-dp --dp --dp-size --data-parallel-size",
    "use --kv-dtype": "--kv-cache-dtype -ctk --cache-type-k -ctv --cache-type-v",
    "use --kv-cache-memory or --num-chunks": "--num-gpu-blocks-override --kv-cache-memory-bytes",
    "use --gpu-memory-utilization": "--mem-fraction-static --cuda-memory-fraction",
    "use --chunk-size": "--block-size --page-size",
    "use --lora NAME=FOLDER": "--enable-lora --lora-modules --lora-paths --lora-adapters",
    "use --device cuda, which takes the whole model": "-ngl --gpu-layers --n-gpu-layers",
    "use --speculation auto, with --draft-model if you have one": "-md --model-draft "
    "--speculative-config --speculative-model --speculative-algorithm --num-speculative-tokens",
    "use --threads": "-t",
    "use --served-model-name": "-a --alias --served-name",
    "use --cache-tier-memory or --cache-tier-dir": "--swap-space --cpu-offload-gb "
    "--enable-hierarchical-cache",
    "use --snapshot-dir": "--slot-save-path",
    "use --log-level": "-v --verbose --log-disable --uvicorn-log-level",
    "use --log-format json": "--json-output",
    "use --cors-origins": "--allowed-origins --cors-allow-origin",
    "use --host": "--hostname",
    "use --seed": "--random-seed",
    "use --scheduling-policy": "--schedule-policy",
    "use --quantization": "--quantize",
    "use --chat-template": "--chat-template-file",
    "use --ssl-certfile": "--ssl-cert-file",
    "use --ssl-keyfile": "--ssl-key-file",
    "use --engine-hang-seconds": "--watchdog-timeout",
    "use --otlp-endpoint": "--otlp-traces-endpoint",
    "use --kv-events-endpoint": "--kv-events-config",
    "set the variable CHUNKLLAMA_CACHE": "--download-dir --huggingface-hub-cache",
    "set it in each request": "--temp --temperature --top-p --top-k --min-p -n --n-predict "
    "--max-tokens --repeat-penalty",
    f"{_DROP}it is always so": "--enable-chunked-prefill "
    "--enable-auto-tool-choice --jinja --enable-metrics --metrics --cont-batching -cb "
    "--continuous-batching --embedding --embeddings --enable-cache-report --slots "
    "--async-scheduling --enable-reasoning",
    f"{_DROP}the server chooses it": "--max-loras --max-lora-rank --max-cpu-loras "
    "--max-loras-per-batch --attention-backend --enforce-eager --compilation-config -fa "
    "--flash-attn --disable-cuda-graph --mlock --no-mmap --max-seq-len-to-capture "
    "--cuda-graph-max-bs --enable-torch-compile --guided-decoding-backend --grammar-backend "
    "--sampling-backend --num-scheduler-steps --distributed-executor-backend --threads-http "
    "--api-server-count --workers",
    "use --no-enable-prefix-caching": "--disable-radix-cache --no-prefix-caching",
    f"{_DROP}code of a model folder is not executed": "--trust-remote-code",
    f"{_DROP}the chat template shows the tags; else --reasoning-tags": "--reasoning-parser "
    "--reasoning-format",
    f"{_DROP}no prompt is logged": "--disable-log-requests --disable-log-stats",
    f"{_DROP}the tokenizer is read from the model's folder": "--tokenizer --tokenizer-path",
    f"{_DROP}images are not served": "--mmproj --limit-mm-per-prompt",
}
_BENCH: Final = {
    "use --url": "--base-url",
    "use --conversations": "--num-prompts",
    "use --rate": "--request-rate",
    "use --concurrency": "--max-concurrency",
    "use --system-tokens and --user-tokens": "--random-input-len --input-len",
    "use --output-tokens": "--random-output-len --sharegpt-output-len --output-len",
    "use --output FOLDER": "--save-result --result-dir",
    "use --trace FILE": "--dataset-name --dataset-path",
}
# What to do -> first words of a command line.
_COMMANDS: Final = {
    f"write chunkllama serve MODEL{_DIALOGUE}": "run chat",
    "write chunkllama serve": "start launch server launch_server launcher up",
    "write chunkllama models fetch MODEL": "pull download",
    "write chunkllama models": "list ls",
    "write chunkllama health; /dashboard of the server shows what runs": "ps status",
    "write chunkllama doctor": "collect-env env check info",
    "write chunkllama config show, or chunkllama doctor": "show",
    "write chunkllama serve MODEL, where MODEL is a folder or a file": "create",
    "write chunkllama batch REQUESTS ANSWERS": "run-batch",
    "write chunkllama bench serve": "benchmark",
    "write chunkllama finetune": "train",
    "write chunkllama --help, or chunkllama COMMAND --help": "help",
    "delete the model's folder in models/ of the cache, which is $CHUNKLLAMA_CACHE or "
    "~/.cache/chunkllama": "rm",
    "a folder may be copied, and --served-model-name gives a model its names": "cp",
    "models are not uploaded": "push",
}


def _by_name(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: what for what, names in groups.items() for name in names.split()}


_OPTION: Final = re.compile(r"--[a-z-]+")
SERVE: Final = _by_name(_SERVE)
BENCH: Final = _by_name(_BENCH)
COMMANDS: Final = _by_name(_COMMANDS)


def explain(error: Any, arguments: Sequence[str]) -> str:
    """Describe a refused command line in one line.

    Args:
        error: click's usage error.
        arguments: the command line.
    """
    first = arguments[0] if arguments else ""
    message = str(error.format_message())
    if message.startswith("No such command") and first in COMMANDS:
        return f"no command '{first}' here; {COMMANDS[first]}"
    if type(error).__name__ != "NoSuchOption":
        return message
    command = getattr(error.ctx, "command", None)
    known = {name for each in getattr(command, "params", ()) for name in each.opts}
    flags = BENCH if first == "bench" else SERVE
    if not first.startswith("-"):  # else the command that is meant is `serve`
        flags = {name: what for name, what in flags.items() if _is_of(what, known)}
    others = dict(_named(arguments, flags, known))
    parts = [f"no option {name} here, {what}" for name, what in others.items()]
    if first.startswith("-"):
        parts.insert(0, f"a command comes before {first}, such as chunkllama serve")
    if parts:
        return "; ".join(parts)
    near = difflib.get_close_matches(error.option_name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"No such option: {error.option_name}{hint}"


def _named(
    arguments: Sequence[str], flags: Mapping[str, str], known: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield the flags of other servers in a command line, with what takes their place."""
    for word in arguments:
        name = word.partition("=")[0]
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name in flags and name not in known:
            yield name, flags[name]


def _is_of(advice: str, known: set[str]) -> bool:
    """Whether a command has an option that the advice names; one that names none is of a model."""
    return not known.isdisjoint(_OPTION.findall(advice) or ["--model"])
