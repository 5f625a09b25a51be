"""The oracle: a dual tower written the slow and obvious way, one document at a time, from DESIGN's definition.

Both towers run over the document's *full* sequence of image and text tokens; in every layer of the right tower the
keys and values at image positions are replaced by the left tower's. Plain loops and einsum; it shares with the real
model nothing but weights.
"""

import math

import torch
from torch import Tensor


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """x (T, heads, E) at positions 0…T−1, pair by pair as complex numbers."""
    T, _, E = x.shape
    out = torch.empty_like(x)
    for t in range(T):
        for i in range(E // 2):
            angle = t * theta ** (-2 * i / E)
            c, s = math.cos(angle), math.sin(angle)
            a, b = x[t, :, i], x[t, :, i + E // 2]
            out[t, :, i], out[t, :, i + E // 2] = a * c - b * s, a * s + b * c
    return out


class Naive:
    def __init__(self, model) -> None:
        self.config = model.config
        self.w = {k: v.detach() for k, v in model.state_dict().items()}
        self.vocabulary = model.vocabulary
        with torch.no_grad():
            self.image_tokens = lambda tiles: model.left.modality_projector(model.left.vision_encoder(tiles))

    def tower(self, prefix: str, c, x: Tensor, mask: Tensor, replaced=None):
        """x (T, D), mask (T, T); → final hidden (T, D) and each layer's unrotated keys and values (T, G, E)."""
        w, kvs = self.w, []
        for layer in range(c.layers):
            last_left = f"{prefix}last." in "".join(w) and layer == c.layers - 1
            p = f"{prefix}last." if last_left else f"{prefix}layers.{layer}."
            q = f"{p}" if last_left else f"{p}self_attn."
            h = _norm(x, w[f"{p}input_layernorm.weight"], c.norm_eps)
            k, v = ((h @ w[f"{q}{n}_proj.weight"].T).view(len(x), c.kv_heads, c.head_size) for n in "kv")
            kvs.append((k.clone(), v.clone()))
            if last_left:
                break
            if replaced is not None:
                where, left = replaced
                k[where], v[where] = left[layer][0][where], left[layer][1][where]
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
            x = x + (gate * gate.sigmoid() * (h @ w[f"{p}mlp.up_proj.weight"].T)) @ w[f"{p}mlp.down_proj.weight"].T
        return x, kvs

    def logits(self, ids: list[int], tiles: Tensor) -> Tensor:
        """A document's full sequence of ids, image tokens in their places → logits at its text positions (R, V)."""
        v, T = self.vocabulary, len(ids)
        is_image = torch.tensor([i >= v.text_size for i in ids])
        features = self.image_tokens(tiles).flatten(0, 1)
        left_x = torch.zeros(T, self.config.left.hidden_size)
        image_of = torch.full((T,), -1)
        used, image = 0, -1
        for t, i in enumerate(ids):
            if i == v.image_token_id:
                left_x[t] = features[used]
                used += 1
            elif i > v.image_token_id:
                image += 1
                left_x[t] = self.w["left.embed_markers.weight"][i - v.image_token_id - 1]
            if is_image[t]:
                image_of[t] = image
        mask = torch.zeros(T, T, dtype=torch.bool)
        for q in range(T):
            for k in range(T):
                if not is_image[q] or not is_image[k]:
                    mask[q, k] = q == k  # text rows of the left tower are never read
                    continue
                same = bool(image_of[q] == image_of[k])
                allowed = same or not self.config.image_isolation
                mask[q, k] = allowed and (k <= q or (same and self.config.left_attention == "bidirectional"))
        _, left = self.tower("left.decoder.", self.config.left, left_x, mask)
        table = self.w["right.embed_tokens.weight"]
        x = torch.stack([table[i] if i < v.text_size else torch.randn(table.shape[1]) for i in ids])
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        hidden, _ = self.tower("right.", self.config.right, x, causal, (is_image, left))
        hidden = _norm(hidden, self.w["right.norm.weight"], self.config.right.norm_eps)
        return (hidden @ table.T)[~is_image]
