"""The oracle: a dual tower written in the slow, obvious way from the definition in docs/architecture.md.

It runs one document at a time. Both towers run over the document's *full* sequence of image and text tokens;
in every layer of the right tower, the keys and values at image positions are replaced by the left tower's.
Plain loops and einsum; it shares only the weights with the real model.
"""

import math

import torch
from torch import Tensor


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x (T, heads, E) at positions 0…T−1.

    Components i and i + E/2 form one complex number, rotated by t · theta^(−2i/E).
    """
    T, _, E = x.shape
    angles = torch.tensor([[t * theta ** (-2 * i / E) for i in range(E // 2)] for t in range(T)])
    turned = (
        torch.complex(x[..., : E // 2], x[..., E // 2 :])
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((turned.real, turned.imag), -1)


def scattered(part: Tensor, rows: Tensor) -> Tensor:
    """`part` (n, …) as the `rows` (T,) of a tensor (T, …) that holds noise elsewhere."""
    whole = torch.randn(len(rows), *part.shape[1:])
    whole[rows] = part
    return whole


class Naive:
    def __init__(self, model) -> None:
        self.config = model.config
        self.w = {k: v.detach() for k, v in model.state_dict().items()}
        self.vocabulary = model.vocabulary
        with torch.no_grad():
            parts = model.parts()
            self.image_tokens = lambda tiles: parts["projector"](parts["vision"](tiles))

    def tower(self, prefix: str, c, x: Tensor, mask: Tensor, replaced=None):
        """Run one tower over x (T, D) with mask (T, T).

        Returns the final hidden states (T, D) and each layer's unrotated keys and values (T, G, E).
        """
        w, kvs = self.w, []
        for layer in range(c.layers):
            p, q = f"{prefix}layers.{layer}.", f"{prefix}layers.{layer}.self_attn."
            last_left = f"{q}q_proj.weight" not in w
            h = _norm(x, w[f"{p}input_layernorm.weight"], c.norm_eps)
            k, v = ((h @ w[f"{q}{n}_proj.weight"].T).view(len(x), c.kv_heads, c.head_size) for n in "kv")
            kvs.append((k.clone(), v.clone()))
            if last_left:
                break
            if replaced is not None:
                positions, left = replaced
                k[positions], v[positions] = left[layer][0][positions], left[layer][1][positions]
            queries = (h @ w[f"{q}q_proj.weight"].T).view(len(x), c.heads, c.head_size)
            queries, k = _rotate(queries, c.rope_theta), _rotate(k, c.rope_theta)
            out = torch.zeros(len(x), c.heads, c.head_size)
            for head in range(c.heads):
                g = head // (c.heads // c.kv_heads)
                scores = queries[:, head] @ k[:, g].T / math.sqrt(c.head_size)
                out[:, head] = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, g]
            x = x + out.flatten(1) @ w[f"{q}o_proj.weight"].T
            h = _norm(x, w[f"{p}post_attention_layernorm.weight"], c.norm_eps)
            gate = h @ w[f"{p}mlp.gate_proj.weight"].T
            x = (
                x
                + (gate * gate.sigmoid() * (h @ w[f"{p}mlp.up_proj.weight"].T))
                @ w[f"{p}mlp.down_proj.weight"].T
            )
        return x, kvs

    def logits(self, ids: list[int], tiles: Tensor) -> Tensor:
        """Logits at the positions of a document's right stream (R, V).

        The ids are the document's full sequence, with image tokens at their positions.
        """
        v, T, context = self.vocabulary, len(ids), self.config.left_context
        image_of = torch.full((T,), -1)
        image = -1
        for t, i in enumerate(ids):
            image += i == v.first_marker_id  # its global view; tile markers go on with the same image
            image_of[t] = image if i >= v.text_size else -1
        is_image = image_of >= 0
        last = int(is_image.nonzero().max()) if is_image.any() else -1
        goes_left = {
            "image": is_image,
            "prefix": torch.arange(T) <= last,
            "none": torch.zeros(T, dtype=torch.bool),
        }[context]
        features = self.image_tokens(tiles).flatten(0, 1) if len(tiles) else tiles

        def embedded(table: Tensor, first: int, selected: Tensor) -> Tensor:
            x, used = torch.randn(T, table.shape[1]), 0  # noise where nothing may be read
            for t, i in enumerate(ids):
                if selected[t]:
                    x[t] = features[used] if i == v.image_token_id else table[i - first]
                    used += i == v.image_token_id
            return x

        if context == "none" or not goes_left.any():
            x = embedded(self.w["right.embed_tokens.weight"], 0, ~goes_left)
            replaced = None
        else:
            mask = torch.zeros(T, T, dtype=torch.bool)
            for q in range(T):
                for k in range(T):
                    if not goes_left[q] or not goes_left[k]:
                        mask[q, k] = q == k  # what does not go left is never read
                        continue
                    same = bool(is_image[q] and image_of[q] == image_of[k])
                    allowed = same or not self.config.image_isolation
                    mask[q, k] = allowed and (
                        k <= q or (same and self.config.left_attention == "bidirectional")
                    )
            left_x = embedded(
                self.w["left.embed_tokens.weight"], v.first_marker_id if context == "image" else 0, goes_left
            )
            # The left tower counts its own tokens: text between images changes no image KV.
            own = self.tower(
                "left.decoder.", self.config.left, left_x[goes_left], mask[goes_left][:, goes_left]
            )[1]
            if (gates := self.w.get("left.bridge.gates")) is not None:
                own = [
                    [part * (1 + gates[layer, i, :, 0]) for i, part in enumerate(kv)]
                    for layer, kv in enumerate(own)
                ]
            left_kvs = [[scattered(part, goes_left) for part in kv] for kv in own]
            layer_map = self.config.layer_map.split(",") if self.config.layer_map else range(len(left_kvs))
            replaced = goes_left, [left_kvs[int(layer)] for layer in layer_map]
            table = self.w["right.embed_tokens.weight"]
            x = torch.stack(
                [torch.randn(table.shape[1]) if goes_left[t] else table[i] for t, i in enumerate(ids)]
            )
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        hidden, _ = self.tower("right.", self.config.right, x, causal, replaced)
        hidden = _norm(hidden, self.w["right.norm.weight"], self.config.right.norm_eps)
        return (hidden @ self.w["right.embed_tokens.weight"].T)[~goes_left]
