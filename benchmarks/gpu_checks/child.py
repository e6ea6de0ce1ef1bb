"""Run one check and write what it finds, a line of JSON each: `child.py NAME DEVICE FILE`."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_checks.findings import Finding, SkippedError, failed
from gpu_checks.stand_ins import replace_missing

replace_missing()

from gpu_checks import (  # noqa: E402 (behind the stand-ins)
    compiled,
    kernels,
    mfu,
    numerics,
    one_rank,
    roofline,
    saves,
    waits,
)

FUNCTIONS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "roofline": roofline.rates,
    "compile bf16": compiled.bf16_blocks,
    "compile fp8": compiled.fp8_blocks,
    "compiled steps": waits.compiled_steps,
    "fp32": numerics.single_precision,
    "half precision": numerics.half_precision,
    "overflow": numerics.overflow,
    "deterministic": numerics.deterministic,
    "8-bit memory": numerics.eight_bit_memory,
    "kernels": kernels.launched_kernels,
    "steps without waiting": waits.eager_steps,
    "collectives": one_rank.collectives,
    "replicas and shards": one_rank.replicas_and_shards,
    "races": saves.races,
    "sleeping kernel": waits.sleeping_kernel,
    "llama-1b eager": mfu.llama_eager,
    "llama-1b compiled": mfu.llama_compiled,
    "llama-1b documents": mfu.llama_documents,
    "llama-1b fp8": mfu.llama_fp8,
    "llama-8b width": mfu.llama_8b_width,
    "gpt2": mfu.gpt2,
    "vit-l16": mfu.vit,
    "save": saves.background_save,
}


def main(name: str, device: str, path: str) -> None:
    """Run the check of this name; an error is an entry too, and its traceback goes to stderr."""
    began = time.perf_counter()
    with Path(path).open("a", encoding="utf-8") as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        try:
            for finding in FUNCTIONS[name](device):
                now = time.perf_counter()
                write(finding.row(device, now - began))
                began = now
        except SkippedError as reason:
            write(failed(name, f"not run: {reason}", None))
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            text = f"{type(error).__name__}: {first}"
            write(failed(name, text, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(*sys.argv[1:])
