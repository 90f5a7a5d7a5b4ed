"""The demo model in plain torch, with the parameter names and arithmetic of transformers' qwen2_moe.

It exists for training speed: every expert runs on every token and the unchosen ones get weight zero.
That is 4 times the arithmetic of routing, but only two large matrix products and one fused element-wise
pass per layer, with nothing sorted and no launch per expert: 1.98 M tokens/s compiled on one H100.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


def demo_config(vocab: int) -> Qwen2MoeConfig:
    """Shape of the demo model: 12.9 M parameters, 16 experts of which 4 work on a token."""
    return Qwen2MoeConfig(
        vocab_size=vocab,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        intermediate_size=256,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        router_aux_loss_coef=0.001,
    )


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        kv_size = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, tokens, hidden]; cos and sin [tokens, head_dim]."""
        batch, tokens, _ = x.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, tokens, count, self.head_dim).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.chunk(2, dim=-1)
            return (y * cos + torch.cat((-high, low), dim=-1) * sin).to(y.dtype)

        q = rotate(heads(self.q_proj(x), self.heads))
        k = rotate(heads(self.k_proj(x), self.kv_heads))
        v = heads(self.v_proj(x), self.kv_heads)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Gate(nn.Module):
    """Router weights."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))


class Experts(nn.Module):
    """Stacked expert weights; the first half of ``gate_up_proj`` rows are gates."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [batch, tokens, hidden], weights [batch, tokens, experts], zero for unchosen experts."""
        experts, hidden, inner = self.down_proj.shape
        gate_up = functional.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (experts, 2, inner))
        y = functional.silu(gate_up[..., 0, :]) * gate_up[..., 1, :] * weights.unsqueeze(-1)
        return functional.linear(y.to(gate_up.dtype).flatten(-2), self.down_proj.transpose(0, 1).reshape(hidden, -1))


class Mlp(nn.Module):
    """The shared expert."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoeBlock(nn.Module):
    """Top-k routed experts and a gated shared expert."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.gate = Gate(config.num_experts, hidden)
        self.experts = Experts(config.num_experts, hidden, config.moe_intermediate_size)
        self.shared_expert = Mlp(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and per expert the share of tokens it got and its mean router probability."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = functional.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)
        better = (probabilities.unsqueeze(-2) > probabilities.unsqueeze(-1)).sum(dim=-1)
        chosen = better < self.top_k
        weights = torch.where(chosen, probabilities, 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        y = self.experts(x, weights) + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y, chosen.float().mean(dim=(0, 1)), probabilities.mean(dim=(0, 1))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoeBlock(config)
        self.input_layernorm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, traffic, probability = self.mlp(self.post_attention_layernorm(x))
        return x + y, traffic, probability


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)


class DemoMoe(nn.Module):
    """The language model; the embedding is also the output matrix."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
                inward = 0.02 if "embed" in name or "gate.weight" in name else parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=inward * (0.3 if residual else 1.0))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [batch, tokens, vocab], traffic and router probability [layers, experts] of [batch, tokens] ids."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, head_dim, 2, device=tokens.device, dtype=torch.float32) / head_dim
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)[:, None] * theta**-steps
        angles = torch.cat((angles, angles), dim=-1)
        x = self.model.embed_tokens(tokens)
        traffic, probability = [], []
        for layer in self.model.layers:
            x, share, mean = layer(x, angles.cos(), angles.sin())
            traffic.append(share)
            probability.append(mean)
        logits = functional.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return logits, torch.stack(traffic), torch.stack(probability)

    def to_transformers(self) -> Qwen2MoeForCausalLM:
        """The same model as transformers has it, in bfloat16 on the CPU."""
        twin = Qwen2MoeForCausalLM(self.config)
        state = {name: value.detach().float().cpu() for name, value in self.state_dict().items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        twin.load_state_dict(state)
        return twin.to(torch.bfloat16)
