"""Mamba and Mamba-2 against the modules of the transformers library, through both layouts of checkpoints.

Every parameter is random: those that start at 0 or 1 would hide what is left out. Theirs is compared in its full
forward: its cached decoding of Mamba-2 forgets `time_step_limit` (5.23), so that with limits it differs from itself.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.cli.main import main
from longwave.cli.model import load_model
from longwave.layers.mixer import Context
from longwave.models import safetensors, state_spaces
from longwave.training.state import split
from tests.tolerances import FORWARD, relative_error

torch = pytest.importorskip("torch", reason="needs torch: uv run --group parity pytest -m parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: uv run --group parity pytest -m parity")
pytestmark = pytest.mark.parity
TOLERANCE = FORWARD["float32"]  # of gradients too
VOCAB, ROWS, WIDTH, BATCH = 61, 64, 32, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """length: of the rows.  padded: how many tokens of padding the second one begins with."""

    kind: str
    length: int = 19
    padded: int = 0
    settings: dict = dataclasses.field(default_factory=dict)

    def model(self):
        """Theirs, every parameter drawn anew."""
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": ROWS}
        if self.kind == "mamba":
            config = transformers.MambaConfig(**sizes, **{"state_size": 8, **self.settings})
        else:
            own = {"state_size": 16, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8}
            own["tie_word_embeddings"] = True
            config = transformers.Mamba2Config(**sizes, **{**own, **self.settings})
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn_like(p)
                if name.endswith("A_log"):
                    p.copy_(0.5 * noise)
                elif name.endswith(("dt_proj.bias", "dt_bias")):
                    p.copy_(noise - 2)
                elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                    p.copy_(1 + 0.3 * noise)
                else:
                    p.copy_(noise * (0.2 if p.ndim > 1 else 0.3))
        return model

    def tokens(self):
        """ids and attention mask."""
        ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, self.length))
        mask = np.ones((BATCH, self.length), bool)
        mask[1, : self.padded] = False
        return ids, mask


CASES = {
    "Mamba, 19 tokens": Case("mamba"),
    "Mamba, 2 tokens": Case("mamba", length=2),
    "Mamba, biases, untied": Case("mamba", settings={"use_bias": True, "tie_word_embeddings": False}),
    "Mamba, left padding": Case("mamba", padded=6),
    "Mamba-2, 19 tokens": Case("mamba2"),
    "Mamba-2, two groups, untied": Case("mamba2", 24, settings={"n_groups": 2, "tie_word_embeddings": False}),
    "Mamba-2, shorter than a chunk": Case("mamba2", 5),
    "Mamba-2, left padding": Case("mamba2", padded=6),
    "Mamba-2, limits of dt": Case("mamba2", settings={"time_step_limit": (0.05, 0.3), "use_bias": True}),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param, CASES[request.param]


@pytest.fixture(scope="module")
def theirs(case):
    """Their model, and what it computes: logits, hidden states, the gradient of the mean cost by name."""
    model, (ids, mask) = case[1].model(), case[1].tokens()
    masks = {"attention_mask": torch.tensor(mask).long()}
    out = model(torch.tensor(ids), **masks, output_hidden_states=True, use_cache=False)
    weight = torch.tensor(mask[:, :-1] & mask[:, 1:])
    cost = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].transpose(1, 2), torch.tensor(ids[:, 1:]), reduction="none"
    )
    (cost * weight).sum().div(weight.sum()).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return model, out.logits.detach().numpy(), [h.detach().numpy() for h in out.hidden_states], gradients


@pytest.fixture(scope="module")
def ours(case, theirs, tmp_path_factory):
    """The model, imported from what theirs saves."""
    folder = tmp_path_factory.mktemp("hf")
    theirs[0].save_pretrained(folder / "in", safe_serialization=True)
    assert main(["import", str(folder / "in"), "--out", str(folder / "out")]) == 0
    return folder, load_model(folder / "out")


def compared(what, name, got, want):
    error = relative_error(got, want)
    print(f"{name}: {what} {error:.1e}")
    assert error <= TOLERANCE, f"{what}: {error:.2e}"


def test_logits_and_hidden_states(case, theirs, ours):
    name, (ids, mask) = case[0], case[1].tokens()
    model, ctx = ours[1].model, Context(valid=jnp.asarray(mask))

    @jax.jit
    def run(ids):
        x, states = model.backbone.encoder(ids), []
        for layer in model.backbone.layers:
            states.append(x := layer(x, None, ctx).y)
        return model(ids, None, ctx).logits, [*states, model.backbone.norm(x)]

    logits, states = run(ids)
    compared("logits", name, logits[mask], theirs[1][mask])
    assert len(states) == len(theirs[2])
    for i, (got, want) in enumerate(zip(states, theirs[2], strict=True)):
        compared(f"hidden states, {i}", name, got[mask], want[mask])


def test_gradient_of_every_parameter(case, theirs, ours):
    (ids, mask), loaded = case[1].tokens(), ours[1]
    params, rest = split(loaded.model)
    weight = (mask[:, :-1] & mask[:, 1:]).astype(np.float32)

    @jax.jit
    def gradients(params):
        def cost(params):
            model = loaded.definition.merge(params, rest)
            log_p = jax.nn.log_softmax(model(ids, None, Context(valid=jnp.asarray(mask))).logits[:, :-1])
            return -(jnp.take_along_axis(log_p, ids[:, 1:, None], 2)[..., 0] * weight).sum() / weight.sum()

        return jax.grad(cost)(params)

    description = state_spaces.describe(json.loads((ours[0] / "in" / "config.json").read_text()))
    want = state_spaces.convert(description, theirs[3])
    got = {
        jax.tree_util.keystr(k, simple=True, separator="/"): g for k, g in jax.tree.leaves_with_path(gradients(params))
    }
    assert got.keys() == want.keys()
    worst = max(want, key=lambda name: relative_error(got[name], want[name]))
    compared(f"gradients, {worst}", case[0], got[worst], want[worst])


def test_decoding_with_a_carry_is_the_full_forward(case, theirs, ours):
    ids, mask = case[1].tokens()
    model = ours[1].model
    step = jax.jit(lambda ids, mask, carry: model(ids, carry, Context(valid=mask))[:2])
    carry, logits = model.backbone.init_carry(BATCH), []
    for t in range(case[1].length):
        out, carry = step(ids[:, t : t + 1], mask[:, t : t + 1], carry)
        logits.append(out)
    compared("decoding", case[0], np.concatenate(logits, 1)[mask], theirs[1][mask])


def test_the_original_layout_holds_the_same(case, theirs, ours, tmp_path):
    """The same tensors as the authors' package would write them, in a pickle."""
    kind, config = case[1].kind, theirs[0].config
    ssm = {"d_state": config.state_size, "bias": config.use_bias}
    if kind == "mamba2":
        limit = [b if np.isfinite(b) else float("inf") for b in config.time_step_limit]
        ssm |= {"layer": "Mamba2", "headdim": 16, "ngroups": config.n_groups, "chunk_size": 8, "dt_limit": limit}
    written = {
        "d_model": WIDTH, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(written))
    tensors = {name.replace("embeddings", "embedding"): p for name, p in theirs[0].state_dict().items()}
    torch.save(tensors, tmp_path / "in" / "pytorch_model.bin")
    assert main(["import", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    got, want = (safetensors.load(f / "out" / "model.safetensors") for f in (tmp_path, ours[0]))
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    model = load_model(tmp_path / "out").model
    logits = jax.jit(lambda ids: model(ids).logits)(case[1].tokens()[0])
    assert logits.shape[-1] == ROWS
    assert np.all(logits[..., VOCAB:] < -1e38)
    if not case[1].padded:
        compared("logits, original layout", case[0], logits[..., :VOCAB], theirs[1][..., :VOCAB])
