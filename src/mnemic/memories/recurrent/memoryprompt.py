"""MemoryPrompt: a light wrapper to improve context tracking (2024, arXiv 2402.15268, LREC-COLING 2024).

An LSTM outside of a frozen language model: the last hidden state of a segment drives it, and what it holds stands, as m
soft tokens of the host's width e, in front of the next segment.

    u = last hidden state, after the host's final norm, of the segment's last token
    z = W_2 relu(W_1 u + b_1) + b_2;   (h, c) <- LSTM(z, (h, c));   P = h as m vectors
    input of the next segment = [P ; tokens];   loss += penalty * mean |P_i|

Only the wrapper is to be trained: `freeze_host(model)`. It has 4 (width m e + (m e)^2) weights in the LSTM alone, about
75 million for m = 5 and e = 768.

Decisions:
- A first segment has no prompt: its tokens see none, and it is the host's. With a table of positions its text starts
  at 0, that of later segments at m: the prompt takes real positions.
- Nothing else starts as the identity, and no scale on P could make it: m zero vectors are still m tokens among which
  the attention divides itself.
- The MLP starts with Xavier weights of gain 1e-4; the LSTM as torch's, as in the released code, whose initialisation
  does not reach it. Numbers of P are within (-1, 1), embeddings much smaller: that is what the penalty is for, and
  `diagnostics` has the ratio.
- The penalty is taken of prompts that are read, so that of a text's last segment does not count.
- The released code finds the last real token by the length of right padding. Rows are aligned here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import Step


@dataclass(frozen=True, kw_only=True)
class MemoryPromptConfig(MemoryConfig):
    name = "memoryprompt"

    num_tokens: int = option(5, "vectors m of the prompt", minimum=1)
    width: int = option(1024, "width of the MLP's layers", minimum=1)
    penalty: float = option(0.1, "weight of the prompt's norm in the training loss", minimum=0)


class MemoryPrompt(Memory):
    name = "memoryprompt"
    config_class = MemoryPromptConfig
    paper = "MemoryPrompt: A Light Wrapper to Improve Context Tracking (2024, arXiv 2402.15268)"
    state_size = "2 * num_tokens * d"
    keeps_hidden = True
    config: MemoryPromptConfig

    def __init__(self, config: MemoryPromptConfig, host: HostSpec):
        super().__init__(config, host)
        self.num_read_tokens = config.num_tokens
        factory = {"dtype": host.dtype, "device": host.device}
        self.mlp = nn.Sequential(
            nn.Linear(host.hidden_size, config.width, **factory),
            nn.ReLU(),
            nn.Linear(config.width, config.width, **factory),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, gain=1e-4)
        self.lstm = nn.LSTMCell(config.width, config.num_tokens * host.hidden_size, **factory)

    def initial_state(self, batch_size: int) -> State:
        """ "hidden" and "cell" (B, m e), zeros; "count" (B,), segments read so far."""
        zeros = self.lstm.bias_hh.new_zeros(batch_size, self.lstm.hidden_size)
        count = torch.zeros(batch_size, dtype=torch.int64, device=zeros.device)
        return State({"hidden": zeros, "cell": zeros, "count": count})

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        prompt = self._prompt(state["hidden"])
        return prompt, prompt[:, :0]

    def tokens_there(self, state: State) -> Tensor:
        return state["count"] > 0

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """Nothing: adds the prompt's norm to the loss of the rows that read it now."""
        if step.training and self.config.penalty:
            reads = state["count"] > 0
            if step.real is not None:
                reads = reads & step.real.any(1)
            norms = self._prompt(state["hidden"])[reads].norm(dim=-1)
            if norms.numel():
                step.add_loss("prompt_norm", self.config.penalty * norms.mean())
        return {}

    def commit(self, state: State, segment: Segment) -> State:
        last = segment.trace[-1]["hidden"][:, -1]
        hidden, cell = self.lstm(self.mlp(last.to(state["hidden"].dtype)), (state["hidden"], state["cell"]))
        return State({"hidden": hidden, "cell": cell, "count": state["count"] + 1})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Norm of the vectors of the prompt that was read, and relative to that of token embeddings."""
        norm = self._prompt(state["hidden"]).detach().float().norm(dim=-1).mean()
        return {"prompt_norm": norm, "prompt_ratio": norm / (self.host.embedding_std * self.host.hidden_size**0.5)}

    def _prompt(self, hidden: Tensor) -> Tensor:
        """(B, m, e)"""
        return hidden.unflatten(-1, (self.config.num_tokens, -1))
