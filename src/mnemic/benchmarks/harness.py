"""Models with memory in lm-evaluation-harness: every task of the harness, with carried state inside a request.

    python -m mnemic.benchmarks.harness --model mnemic --model_args pretrained=FOLDER --tasks mmlu --num_fewshot 5

takes everything that `lm_eval` takes. The harness (0.4.13) finds models of other packages only once something has
imported them, and has no plug-in group for that; this module does it before it starts the harness. In Python:

    lm_eval.simple_evaluate(model=MnemicLM(FOLDER), tasks=[...])

What differs from the harness's own Hugging Face model: a request of any length is read segment by segment and never
truncated, on either side; every request begins with a new state, whatever its neighbours in a batch; and only the
logits that are scored are kept. Requests that differ in their last token alone share one reading.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..core.errors import ConfigError, MissingExtraError, MnemicError
from ..hosts import base_model, is_attached, load
from ..hosts.saving import describe
from .scoring import score_ends

try:
    from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise MissingExtraError("lm-evaluation-harness is not installed: pip install 'mnemic[eval]'.") from error

# The harness's decorator hides the type of its class.
_Base: Any = HFLM
NAME = "mnemic"
UNLIMITED = 2**31 - 1


class MnemicLM(_Base):
    """A model with memory, as the harness sees it.

    Args:
        pretrained: folder that `mnemic.save` or `mnemic train` wrote, or an attached model.
        tokenizer: a tokenizer or where it lies; by default what lies in the folder, or the host's by its name.
        host: for adapters: the host or its folder; by default the name recorded in the adapter.
        batch_size: requests side by side, a number. device: by default the GPU if there is one; without
            one "cuda" is the CPU, with a warning, as the harness does it.
        dtype: of the weights, as torch names it ("bfloat16"); by default as saved.
        add_bos_token, prefix_token_id, think_end_token, enable_thinking, chat_template_args: as the harness's `hf`.

    Raises:
        ConfigError: settings that do not go with a memory, among them a length to truncate to.
        DataError, FileFormatError, InputError: no model or no tokenizer there.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        host: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f"The harness model {NAME!r} takes no {', '.join(sorted(unknown))}: requests are read whole, on one "
                "device, and how the model is built is fixed by its folder. Leave it out of --model_args."
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(
                f"batch_size = {batch_size!r}, expected a number: the largest batch cannot be found by trying the "
                "longest request, since there is none."
            )
        if isinstance(pretrained, str | Path):
            options: dict[str, Any] = {} if dtype in (None, "auto") else {"dtype": getattr(torch, str(dtype), dtype)}
            model, folder = load(pretrained, host, **options), str(pretrained)
        else:
            if not is_attached(pretrained) or host is not None or dtype is not None:
                raise ConfigError(
                    "pretrained is an object; expected an attached model (mnemic.attach) and neither host nor dtype, "
                    "or a folder. The host without a memory: attach 'none', or use the harness's own model 'hf'."
                )
            model, folder = pretrained, None
        model = model.to(_device(device)).eval()
        if tokenizer is None or isinstance(tokenizer, str | Path):
            name = getattr(base_model(model).config, "_name_or_path", None)
            tokenizer = _tokenizer(*((tokenizer,) if tokenizer else (folder, name)))
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            max_length=UNLIMITED,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        self.folder = folder

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(context, continuation) in tokens -> (log-likelihood in nats, whether greedy decoding would say it)."""
        together: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            together.setdefault(tuple([*context, *continuation][:-1]), []).append(i)
        rows = list(together)
        ends = [[requests[i][2] for i in together[row]] for row in rows]
        answers: dict[int, tuple[float, bool]] = {}
        with Progress(console=Console(stderr=True), disable=disable_tqdm) as bar:
            task = bar.add_task("loglikelihood", total=len(rows))
            for index, scores in score_ends(self.model, rows, ends, batch_size=override_bs or self.batch_size):
                for i, (log_probs, likeliest) in zip(together[rows[index]], scores, strict=True):
                    answers[i] = float(log_probs.sum()), bool(likeliest.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.advance(task)
        return [answers[i] for i in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """What the result file says about the model: parameters, memory, segment, host."""
        base = base_model(self.model)
        about = describe(base)
        return {
            "model_num_parameters": sum(p.numel() for p in base.parameters()),
            "model_dtype": str(base.dtype),
            "model_folder": self.folder,
            "memory": about["memory"],
            "segment": about["segment"],
            "host": about["host"],
            "state": "new for every request",
            "truncated_requests": 0,
        }


def _device(asked: str | None) -> str:
    if torch.cuda.is_available():
        return asked or "cuda"
    if asked is not None and asked.startswith("cuda"):
        # The command line of the harness asks for a GPU unless told otherwise.
        logging.getLogger(__name__).warning("No GPU for device %s: the model runs on the CPU.", asked)
        return "cpu"
    return asked or "cpu"


def _tokenizer(*places: Any) -> Any:
    from transformers import AutoTokenizer

    tried = []
    for place in places:
        if not place or (Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file()):
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            tried.append(f"{place}: {error}")
    raise ConfigError(
        f"No tokenizer for the model ({'; '.join(tried) or 'none lies beside it and the host has no name'}); give "
        "tokenizer=, a folder or hub name, or save one into the model's folder."
    )


# By name: run as a script this file is another module, and its class another class.
model_registry.register(NAME, target="mnemic.benchmarks.harness:MnemicLM")


def main() -> int:
    """The command line of lm-evaluation-harness, with `mnemic` among its models."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except MnemicError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
