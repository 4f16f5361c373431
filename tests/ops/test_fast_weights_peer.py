"""Fast weights against NeuralMemory of the titans-pytorch package, with its weights."""

import pytest
import torch

from mnemic.ops import fast_weights
from mnemic.ops.fast_weights import Rule

titans = pytest.importorskip("titans_pytorch")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_equals_neural_memory(depth, chunk):
    torch.manual_seed(0)
    width, length = 16, 37
    peer = titans.NeuralMemory(
        dim=width,
        heads=1,
        chunk_size=1,
        batch_size=chunk,
        model=titans.MemoryMLP(width, depth=depth, expansion_factor=2.0),
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=1.0,
    )
    x = torch.randn(2, length, width)
    expected, _ = peer(x)

    stored, asked = peer.store_norm(x), peer.retrieve_norm(x)
    wide = [peer.to_queries(asked), peer.to_keys(stored), peer.to_values(stored)]
    logits = [peer.to_momentum(stored)[0], peer.to_adaptive_step(stored), peer.to_decay_factor(stored)]
    gates = [g.reshape(2, length, 1).sigmoid() for g in logits]
    (q, k, v), (eta, theta, alpha) = (t.unsqueeze(2) for t in wide), gates
    # The peer multiplies x @ W, this engine W x.
    learned = tuple(w.mT for w in peer.memory_model_parameters)
    state = fast_weights.first(learned, 2)
    rule = Rule(chunk=chunk, loss="mean", residual=False)
    y, _ = fast_weights.run(q, k, v, eta, theta, alpha, state, rule)
    torch.testing.assert_close(y.squeeze(2), expected, rtol=0, atol=1e-5)

    probe = torch.randn_like(expected)
    leaves = [p for p in peer.parameters() if p.requires_grad]
    ours = torch.autograd.grad((y.squeeze(2) * probe).sum(), leaves, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())
