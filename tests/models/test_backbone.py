"""The backbone against float64 NumPy, and its forms (scanned, rematerialised, streamed) against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from longwave import models
from longwave.layers.mixer import Context, Mixer, Out
from longwave.layers.mlp import GLU, MLP
from longwave.layers.norms import BatchNorm, LayerNorm, RMSNorm
from tests.models.decay import Decay
from tests.tolerances import FORWARD, GRADIENT, assert_close

IDS = np.random.default_rng(0).integers(0, 11, (3, 8))
LENGTHS = np.array([8, 5, 1])
VALID = jnp.asarray(np.arange(8)[None] < LENGTHS[:, None])


def make(**kwargs):
    options = {"width": 6, "depth": 2, "mixers": (Decay,), **kwargs}
    return models.Backbone(models.Tokens(11, 8), **options, rngs=nnx.Rngs(0))


def copy_of(model):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * np.float64(norm.scale[...]) + np.float64(norm.bias[...])


def affine(layer, x):
    return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def block_oracle(block, x, prenorm):
    def decay(u):
        h = np.zeros_like(u)
        for t in range(u.shape[1]):
            h[:, t] = (np.float64(block.mixer.A[...]) * h[:, t - 1] if t else 0) + u[:, t]
        return h

    def mlp(u):
        u = affine(block.mlp.up, u)
        return affine(block.mlp.down, u * 0.5 * (1 + erf(u / np.sqrt(2))))

    for norm, f in ((block.norm, decay), (block.mlp_norm, mlp)):
        x = x + f(layer_norm(norm, x)) if prenorm else layer_norm(norm, x + f(x))
    return x


@pytest.mark.parametrize("prenorm", [True, False])
def test_blocks_follow_the_equations(prenorm):
    body = make(mlp=MLP, prenorm=prenorm)
    x = np.float64(body.encoder.embedding[...])[IDS]
    for block in body.layers:
        x = block_oracle(block, x, prenorm)
    if prenorm:
        x = layer_norm(body.norm, x)
    assert_close(body(jnp.asarray(IDS)).y, x, FORWARD["float32"])


def loss(model, train):
    out = model(jnp.asarray(IDS), None, Context(valid=VALID, key=jax.random.key(3) if train else None), train)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=out.y.shape), jnp.float32)
    return (weights * jnp.where(VALID[..., None], out.y, 0)).sum(), (out.y, stats)


def gradient(model, train):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    f = lambda p: loss(nnx.merge(graphdef, p, rest), train)
    return jax.jit(jax.grad(f, has_aux=True))(params)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unrolled_with_the_same_parameters(remat):
    scanned = make(depth=4, mixers=(Decay, Decay), mlp=GLU, norm=BatchNorm, scan=True, remat=remat, prenorm=False)
    flat = make(depth=4, mixers=(Decay, Decay), mlp=GLU, norm=BatchNorm, scan=False, prenorm=False)
    nnx.update(flat.encoder, nnx.state(scanned.encoder))
    for i, block in enumerate(flat.layers):  # layer i is slice i // 2 of pattern position i % 2
        nnx.update(block, jax.tree.map(lambda a, i=i: a[i // 2], nnx.state(scanned.layers[i % 2])))
    grads, (y, stats) = gradient(scanned, train=True)
    flat_grads, (flat_y, flat_stats) = gradient(flat, train=True)
    assert_close(y, flat_y, FORWARD["float32"])
    # A bias before BatchNorm has gradient zero, so that gradients are compared as one vector.
    order = [(position, i) for position in range(2) for i in range(2)]
    flatten = lambda trees: jnp.concatenate([a.ravel() for a in jax.tree.leaves(trees)])
    for mine, theirs, tolerance in ((grads, flat_grads, GRADIENT), (stats, flat_stats, FORWARD)):
        sliced = [jax.tree.map(lambda a, i=i: a[i], mine["layers"][position]) for position, i in order]
        unrolled = [theirs["layers"][2 * i + position] for position, i in order]
        assert_close(flatten(sliced), flatten(unrolled), tolerance["float32"])


@pytest.mark.parametrize("scan", [False, True])
def test_any_split_of_the_sequence_gives_the_same_outputs(scan):
    body = make(depth=2, norm=RMSNorm, mlp=GLU, scan=scan)
    full = body(jnp.asarray(IDS))
    carry, pieces = body.init_carry(3), []
    for piece in np.split(IDS, (1, 5), axis=1):
        out = body(jnp.asarray(piece), carry)
        carry = out.carry
        pieces.append(out.y)
    assert_close(jnp.concatenate(pieces, axis=1), full.y, FORWARD["float32"])
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(full.carry), strict=True):
        assert_close(a, b, FORWARD["float32"])


def test_dropout_is_tied_in_time_and_off_without_a_key():
    body = make(depth=1, dropout=0.5, prenorm=False, norm=lambda width, rngs: lambda x, valid, train: x)
    embedded = body.encoder(jnp.asarray(IDS))
    plain = body(jnp.asarray(IDS)).y - embedded
    dropped = body(jnp.asarray(IDS), None, Context(key=jax.random.key(0)), True).y - embedded
    ratio = np.asarray(dropped / plain)
    kept = np.abs(ratio[:, :1] - 2) < 1e-3
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(ratio, np.broadcast_to(np.where(kept, 2.0, 0.0), ratio.shape), atol=1e-3)
    np.testing.assert_array_equal(body(jnp.asarray(IDS), None, Context(), True).y - embedded, plain)


@pytest.mark.parametrize("pooling", ["mean", "largest", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_either_side_leaves_the_logits(side, pooling):
    body = make(norm=LayerNorm)
    model = models.Classifier(body, classes=4, pooling=getattr(models, pooling), rngs=nnx.Rngs(1))
    alone = model(jnp.asarray(IDS[:1, :5]))[0]
    pad = ((0, 0), (0, 3) if side == "right" else (3, 0))
    padded = np.pad(IDS[:1, :5], pad, constant_values=7)
    valid = np.pad(np.ones((1, 5), bool), pad)
    assert_close(model(jnp.asarray(padded), Context(valid=jnp.asarray(valid)))[0], alone, FORWARD["float32"])


def test_largest_takes_every_feature_from_where_it_is_largest():
    x = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32) - 10
    whole = models.largest(jnp.asarray(x), None)
    np.testing.assert_array_equal(whole, [[max(row[:, i]) for i in range(6)] for row in x])
    lengths = (8, 5, 1, 0)
    x[np.arange(8)[None] >= np.array(lengths)[:, None]] = np.nan
    valid = jnp.asarray(np.arange(8)[None] < np.array(lengths)[:, None])
    expected = [[max(row[:n, i], default=0) for i in range(6)] for row, n in zip(x, lengths, strict=True)]
    np.testing.assert_array_equal(models.largest(jnp.asarray(x), valid), expected)
    gradient = jax.grad(lambda x: models.largest(x, valid).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient.sum(1), np.array([[1.0], [1], [1], [0]]) * np.ones(6))


def test_cls_token_stands_before_the_first_valid_token():
    body = make(cls_token=True)
    model = models.Classifier(body, classes=4, pooling=models.cls, rngs=nnx.Rngs(1))
    alone = model(jnp.asarray(IDS[:1, :5]))[0]
    left = np.pad(IDS[:1, :5], ((0, 0), (3, 0)))
    valid = np.pad(np.ones((1, 5), bool), ((0, 0), (3, 0)))
    assert_close(model(jnp.asarray(left), Context(valid=jnp.asarray(valid)))[0], alone, FORWARD["float32"])
    token = body.cls[...]
    body.cls[...] = -token
    assert np.abs(np.asarray(model(jnp.asarray(IDS[:1, :5]))[0] - alone)).max() > 1e-3
    with pytest.raises(ValueError, match="cls_token"):
        models.Classifier(make(), classes=4, pooling=models.cls, rngs=nnx.Rngs(1))


def test_one_hot_encoder_is_an_affine_map_of_one_hot_tokens():
    encoder = models.OneHotEncoder(models.Tokens(11, 8), 512, rngs=nnx.Rngs(0))
    encoder.bias[...] = jnp.arange(512.0)
    expected = np.eye(11)[IDS] @ np.float64(encoder.table[...]) + np.arange(512.0)
    assert_close(encoder(jnp.asarray(IDS)), expected, FORWARD["float32"])
    np.testing.assert_allclose(encoder.table[...].std(), 11**-0.5, rtol=0.05)
    assert np.isnan(encoder(jnp.full((1, 1), 11))).all()


@pytest.mark.parametrize("prenorm", [True, False])
def test_final_norm_is_the_last_thing(prenorm):
    assert (make(prenorm=prenorm).norm is None) != prenorm
    bare, normed = make(prenorm=prenorm, final_norm=False), make(prenorm=prenorm, final_norm=True)
    y = bare(jnp.asarray(IDS)).y
    assert_close(normed(jnp.asarray(IDS)).y, layer_norm(normed.norm, np.float64(y)), FORWARD["float32"])


def test_encoders():
    x = np.random.default_rng(1).normal(size=(2, 6, 3))
    linear = models.LinearEncoder(models.Features(3, 6), 5, rngs=nnx.Rngs(0))
    assert_close(linear(jnp.float32(x)), affine(linear.proj, x), FORWARD["float32"])
    patches = models.PatchEncoder(models.Features(3, 6), 5, patch=2, rngs=nnx.Rngs(0))
    assert_close(patches(jnp.float32(x)), affine(patches.proj, x.reshape(2, 3, 6)), FORWARD["float32"])
    with pytest.raises(ValueError, match=r"patch = 4 .* 6"):
        models.PatchEncoder(models.Features(3, 6), 5, patch=4, rngs=nnx.Rngs(0))
    tokens = models.TokenEmbedding(models.Tokens(11, 8), 5, rngs=nnx.Rngs(0))
    outside = np.isnan(np.asarray(tokens(jnp.asarray([[3, 11, -1]])))).all(-1)
    assert outside.tolist() == [[False, True, True]]


def test_depth_must_be_a_multiple_of_the_pattern():
    with pytest.raises(ValueError, match=r"depth = 3 .* 2 mixers"):
        make(depth=3, mixers=(Decay, Decay))


def test_patches_pool_over_what_is_valid():
    features = models.Features(3, 6)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 3)), jnp.float32)
    encoder = lambda inputs, width, rngs: models.PatchEncoder(inputs, width, patch=2, rngs=rngs)
    body = models.Backbone(features, width=6, depth=1, mixers=(Decay,), encoder=encoder, rngs=nnx.Rngs(0))
    model = models.Classifier(body, classes=4, rngs=nnx.Rngs(1))
    padded = x.at[:, 4:].set(0)
    valid = jnp.asarray([[True] * 4 + [False] * 2])
    assert_close(model(padded, Context(valid=valid))[0], model(x[:, :4])[0], FORWARD["float32"])


@pytest.mark.parametrize("encoder", [models.LinearEncoder, models.TokenEmbedding])
def test_bfloat16_parameters_give_bfloat16_activations_and_float32_logits(encoder):
    tokens = encoder is models.TokenEmbedding
    inputs = models.Tokens(11, 8) if tokens else models.Features(3, 8)
    body = models.Backbone(inputs, width=6, depth=1, mixers=(Decay,), mlp=MLP, rngs=nnx.Rngs(0))
    model = models.Classifier(body, classes=4, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    x = jnp.asarray(IDS) if tokens else jnp.ones((2, 8, 3))
    assert half.backbone(x).y.dtype == jnp.bfloat16
    assert half(x)[0].dtype == jnp.float32


def test_a_summary_token_refuses_what_has_no_single_sequence():
    body = make(cls_token=True)
    with pytest.raises(ValueError, match="cls_token"):
        body(jnp.asarray(IDS), body.init_carry(3))
    with pytest.raises(ValueError, match="cls_token"):
        body(jnp.asarray(IDS), None, Context(reset=VALID))


def test_the_summary_token_and_its_pooling_go_together():
    for body, pooling, named in ((make(cls_token=True), models.mean, "mean"), (make(), models.cls, "cls")):
        with pytest.raises(ValueError, match=rf"Classifier\.pooling = {named} with Backbone\.cls_token"):
            models.Classifier(body, classes=2, pooling=pooling, rngs=nnx.Rngs(0))


class CountsBelow(Decay):
    """Adds the number of lower layers whose side outputs it was given."""

    reads_below = True

    def __call__(self, x, carry=None, ctx=Context()):
        out = super().__call__(x, carry, ctx)
        return out._replace(y=out.y + len([aux["energy"] for aux in ctx.below]))


def test_a_mixer_that_reads_lower_layers_gets_them_and_is_not_scanned():
    plain = lambda width, rngs: lambda x, valid, train: x
    body = make(depth=8, mixers=(CountsBelow,), norm=plain, prenorm=False)
    assert not body.scan
    flat = make(depth=8, mixers=(Decay,), norm=plain, prenorm=False, scan=False)
    nnx.update(flat, nnx.state(body))
    first = lambda model: np.asarray(model(jnp.asarray(IDS[:, :1])).y)  # a layer doubles its input, and adds i
    expected = sum(i * 2 ** (7 - i) for i in range(8))
    assert_close(first(body) - first(flat), np.full((3, 1, 6), expected), 1e-4)
    with pytest.raises(ValueError, match=r"Backbone\.scan = True"):
        make(depth=8, mixers=(CountsBelow,), scan=True)


class Speck(Mixer):
    """Adds 2^-10 to everything, in the type that it is given, and refuses a wide one."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.width = width

    def __call__(self, x, carry=None, ctx=Context()):
        assert x.dtype == jnp.bfloat16
        return Out(jnp.full_like(x, 2.0**-10), (), {})


@pytest.mark.parametrize(("scan", "remat"), [(False, False), (True, True)])
def test_a_float32_residual_stream_keeps_what_bfloat16_loses(scan, remat):
    def run(**options):
        body = make(depth=64, mixers=(Speck,), final_norm=False, scan=scan, remat=remat, **options)
        body.encoder.embedding[...] = jnp.ones_like(body.encoder.embedding)
        graphdef, state = nnx.split(body)
        narrow = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), state))
        return narrow(jnp.asarray(IDS)).y

    y = run(residual_float32=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float64(y), 1 + 64 * 2.0**-10)
    np.testing.assert_array_equal(np.float64(run()), 1.0)


def test_a_float32_residual_stream_needs_prenorm():
    with pytest.raises(ValueError, match="residual_float32"):
        make(prenorm=False, residual_float32=True)
