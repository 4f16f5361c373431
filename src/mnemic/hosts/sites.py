"""Sites: where a host's blocks let a memory in.

A block, its attention and its feed-forward part get a `forward` of their own on the instance, which calls that of their
class around (or instead of) the memory's part. Nothing else of the module changes: names of weights, class and hooks
stay, and `remove` takes it off again. They hold the module only, never a memory: a deep copy of a model is complete.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core.errors import HostError
from ..core.memory import Memory
from ..core.step import Frame
from .anatomy import Anatomy, attention_of, feed_forward_of, linears_of
from .attention import Capture
from .frame import KEYWORD, current, running


class Site:
    """A `forward` that stands in front of the module's own."""

    def __init__(self, module: nn.Module, layer: int):
        self.module, self.layer = module, layer

    def own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class Replay:
    """A layer's checkpointing function that makes the frame current again when the layer is replayed.

    From transformers 5.23 on only a layer's own forward is replayed, from where a site cannot be reached.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.keywords = getattr(function, "keywords", {})

    def __call__(self, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        frame = current()

        def framed(*args: Any) -> Any:
            with running(frame):
                return layer(*args)

        return self.function(framed, *args, **kwargs)


class BlockSite(Site):
    """A decoder block: makes the frame current, and lets the memory at its input and output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        carried = kwargs.get(KEYWORD)
        frame = current() if carried is None else carried.frame
        if frame is None:
            return self.own(*args, **kwargs)
        memory, step = frame.memory, frame.at(self.layer)
        replay = getattr(self.module, "_gradient_checkpointing_func", None)
        if replay is not None and not isinstance(replay, Replay):
            vars(self.module)["_gradient_checkpointing_func"] = Replay(replay)
        with running(frame):
            if memory.uses("before_layer"):
                args, kwargs = _with_input(args, kwargs, lambda x: memory.before_layer(x, step))
            if memory.uses("around_block"):
                output = self._around(memory, frame, args, kwargs)
            else:
                output = self.own(*args, **kwargs)
            if memory.uses("after_layer"):
                output = _with_output(output, lambda x: memory.after_layer(x, step))
        _reached(frame, "block", self.layer)
        return output

    def _around(self, memory: Memory, frame: Frame, args: tuple, kwargs: dict[str, Any]) -> Any:
        outputs: list[Any] = []

        def run(x: Tensor, writing: bool = False) -> Tensor:
            given = _with_input(args, kwargs, lambda _: x)
            # A frame of its own: what replays this pass later finds it as it was.
            with running(replace(frame, writing=True) if writing else frame):
                outputs[:] = [self.own(*given[0], **given[1])]
            return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]

        source = args[0] if args else kwargs["hidden_states"]
        x = memory.around_block(source, run, frame.at(self.layer))
        return _with_output(outputs[0], lambda _: x)


class AttentionSite(Site):
    """A block's attention: what goes in, what comes out, or the whole of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = current()
        if frame is None or self.layer not in frame.memory.layers:
            return self.own(*args, **kwargs)
        memory, step = frame.memory, frame.at(self.layer)
        if memory.uses("before_attention"):
            args, kwargs = _with_input(args, kwargs, lambda x: memory.before_attention(x, step))
        source = args[0] if args else kwargs["hidden_states"]
        if ("attention", self.layer) in memory.claims and memory.uses("mixer"):
            output: Any = (memory.mixer(source, step), None)
        else:
            turned = kwargs.get("position_embeddings")
            if turned is not None:
                frame.rotations[self.layer] = turned
            if getattr(self.module, "layer_idx", None) is None:
                frame.attending = self.layer
            output = self.own(*args, **kwargs)
        if memory.uses("residual"):
            output = _with_output(output, lambda x: memory.residual(x, source, step))
        _reached(frame, "attention", self.layer)
        return output


class FeedForwardSite(Site):
    """A block's feed-forward part."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = current()
        if frame is None or self.layer not in frame.memory.layers:
            return self.own(*args, **kwargs)
        _reached(frame, "feed_forward", self.layer)
        rest: list[Any] = []

        def mlp(x: Tensor) -> Tensor:
            output = self.own(x, *args[1:], **kwargs)
            if not isinstance(output, tuple):
                return output
            rest[:] = output[1:]
            return output[0]

        out = frame.memory.feed_forward(args[0], mlp, frame.at(self.layer))
        return (out, *rest) if rest else out


class LinearSite(Site):
    """One linear layer of a block."""

    def __init__(self, module: nn.Module, layer: int, name: str):
        super().__init__(module, layer)
        self.name = name

    def __call__(self, x: Tensor) -> Tensor:
        out, frame = self.own(x), current()
        if isinstance(frame, Capture):
            frame = frame.frame
        if frame is None or self.layer not in frame.memory.layers:
            return out
        return frame.memory.linear(x, out, self.name, frame.at(self.layer))


class LastHiddenHook:
    """Forward hook of the module that runs the layers: keeps its last hidden state."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        carried = kwargs.get(KEYWORD)
        if carried is not None:
            carried.frame.hidden = output[0]


def install_sites(host: str, memory: Memory, anatomy: Anatomy) -> list[Site]:
    """Put a site before every module that the memory takes part in.

    Raises:
        HostError: the host has no such module.
    """
    sites: list[Site] = []
    inside = memory.sites & {"attention", "residual", "feed_forward"}
    for layer in memory.layers if inside else ():
        block = anatomy.layers[layer]
        sites.append(BlockSite(block, layer))
        if inside & {"attention", "residual"}:
            sites.append(AttentionSite(attention_of(host, block), layer))
        if "feed_forward" in inside:
            sites.append(FeedForwardSite(feed_forward_of(host, block), layer))
        if memory.uses("linear"):
            sites += [LinearSite(module, layer, name) for name, module in linears_of(block)]
    for site in sites:
        if "forward" in vars(site.module):
            raise HostError(f"{host} has a {type(site.module).__name__} whose forward was replaced by other code.")
        vars(site.module)["forward"] = site
    return sites


def replaced_modules(memory: Memory, sites: Sequence[Site]) -> list[nn.Module]:
    """Modules of the host that a memory stands in the place of: their own `forward` never runs."""
    taken = {(site, layer) for site, layer in memory.claims if site == "feed_forward" or memory.uses("mixer")}
    kinds = {AttentionSite: "attention", FeedForwardSite: "feed_forward"}
    return [s.module for s in sites if (kinds.get(type(s)), s.layer) in taken]


def remove_sites(sites: Sequence[Site]) -> None:
    """Give the modules their own `forward` back."""
    for site in sites:
        own = vars(site.module)
        own.pop("forward", None)
        if isinstance(replay := own.get("_gradient_checkpointing_func"), Replay):
            own["_gradient_checkpointing_func"] = replay.function


def _reached(frame: Frame, what: str, layer: int) -> None:
    if frame.reached is not None:
        frame.reached.add((what, layer))


def _with_input(args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _with_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
