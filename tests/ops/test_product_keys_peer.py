"""`lookup` against the PKM of the package product-key-memory (MIT), weights mapped one to one."""

import pytest
import torch
import torch.nn.functional as F

from mnemic.ops import product_keys

peer = pytest.importorskip("product_key_memory")


@pytest.mark.parametrize("top_k", [4, 16])
def test_lookup_equals_the_peer(top_k):
    """The mapping, theirs -> ours:

    query: to_queries (no bias) makes (half, head, e), e = dim_head; a LayerNorm of e features is applied to each
        half-query. Ours wants (head, half, e), so the norm is applied first and the two dimensions are swapped.
    subkeys: keys (head, n, half, e) -> (head, half, n, e).
    values: the table of the EmbeddingBag as it is; row = i n + j with i of half 0 in both.
    """
    torch.manual_seed(0)
    heads, n, e, d = 3, 16, 8, 12
    theirs = peer.PKM(d, heads=heads, num_keys=n, topk=top_k, dim_head=e).eval()
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.norm.bias)
    x = torch.randn(2, 7, d, requires_grad=True)
    want = theirs(x)

    query = theirs.to_queries(x).unflatten(-1, (2, heads, e))
    query = F.layer_norm(query, (e,), theirs.norm.weight, theirs.norm.bias).transpose(-2, -3)
    out = product_keys.lookup(query, theirs.keys.transpose(1, 2), theirs.values.weight, top_k)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)

    leaves = [x, theirs.keys, theirs.values.weight, theirs.to_queries.weight]
    weights = torch.randn_like(want)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    wants = torch.autograd.grad((want * weights).sum(), leaves)
    for grad, other in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-5)
