"""Networks that other people wrote: torchvision's models, and the modules of torch that read `.weight` themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from testbed.torchvision_import import import_torchvision
from tests.strategies import fill_, randn
from torchsmooth import LowRankLinear, load_compressed_, restore_dense_, svd_compress_

models = import_torchvision().models

# The smallest of each family, at the smallest input that the architecture allows: the fast suite.
FAMILIES = {
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
}
EVERY_OTHER = sorted(set(models.list_models(module=models)) - FAMILIES.keys())


def input_size(name):
    """Vision transformers and MaxViT are built for one size; the rest take small images."""
    return 224 if name.startswith(("vit", "maxvit")) else FAMILIES.get(name, 64)


def build(name):
    """Build a model with random weights, smaller where single layers would take minutes each and show nothing new."""
    kwargs = {"init_weights": False} if name.startswith(("googlenet", "inception_v3", "vgg")) else {}
    model = models.get_model(name, weights=None, **kwargs)
    if name.startswith("vgg"):  # its features are what is special, not its 25,088 × 4,096 classifier
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[0], model.classifier[3] = nn.Linear(512, 1024), nn.Linear(1024, 256)
        model.classifier[6] = nn.Linear(256, 1000)
    if name == "regnet_y_128gf":  # without its last two stages, of widths 2,904 and 7,392
        model.trunk_output = model.trunk_output[:2]
        model.fc = nn.Linear(1056, 1000)
    return model


def compressed_runs(model, size, ratio=0.5):
    """Compress, then check what every model must show: parameters, report, train and eval mode, gradients."""
    before = sum(parameter.numel() for parameter in model.parameters())
    layers = [name for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.modules.conv._ConvNd))]
    report = svd_compress_(model, ratio)
    assert sum(parameter.numel() for parameter in model.parameters()) <= (1 - ratio) * before
    assert set(layers) <= {layer.name for layer in report.layers}
    assert all(layer.scheme or layer.reason for layer in report.layers)
    images = randn(2, 3, size, size, seed=0, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        evaluated = model(images)
    assert evaluated.shape == (2, 1000)
    assert bool(evaluated.isfinite().all())
    output = model.train()(images)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(one.mean() for one in outputs if one is not None).backward()
    assert all(bool(one.isfinite().all()) for one in outputs if one is not None)
    swapped = [module for module in model.modules() if hasattr(module, "matricisation")]
    assert swapped
    assert all(module.down.weight.grad is not None for module in swapped)
    return report


@pytest.mark.filterwarnings("ignore:The default weight initialization of")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_torchvision_compresses_to_half(name):
    torch.manual_seed(0)  # torchvision draws its weights from the global state; the fixture puts it back
    compressed_runs(build(name), input_size(name))


def test_a_vision_transformer_compresses_to_half():
    torch.manual_seed(0)
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=128, mlp_dim=512
    )
    report = compressed_runs(model, 32)
    reasons = {layer.name.rsplit(".", 1)[-1]: layer.reason for layer in report.layers}
    assert reasons["self_attention"] == "MultiheadAttention is not supported"


def test_maxvit_compresses_to_half():
    torch.manual_seed(0)
    model = models.MaxVit(
        input_size=(64, 64),
        stem_channels=32,
        partition_size=2,
        block_channels=[32, 64],
        block_layers=[1, 1],
        head_dim=16,
        stochastic_depth_prob=0.0,
        num_classes=1000,
    )
    compressed_runs(model, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of")
@pytest.mark.parametrize("name", EVERY_OTHER)
def test_every_model_of_torchvision_compresses_to_half(name):
    torch.manual_seed(0)
    compressed_runs(build(name), input_size(name))


def encoder_layer(activation="relu", **kwargs):
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, dropout=0.0, activation=activation, **kwargs)
    return fill_(layer, 3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layers_work_in_both_modes(activation, norm_first):
    layer = encoder_layer(activation, norm_first=norm_first)
    report = svd_compress_(layer, 0.3)
    assert {type(layer.linear1), type(layer.linear2)} == {LowRankLinear}
    assert report["self_attn"].reason == "MultiheadAttention is not supported"
    dense = restore_dense_(copy.deepcopy(layer))
    tokens = randn(2, 7, 32, seed=0, dtype=torch.float32)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for training in (True, False):
        layer.train(training), dense.train(training)
        expected = dense(tokens)
        assert torch.allclose(layer(tokens), expected, atol=1e-5)  # in eval mode with gradients: the slow path
        with torch.no_grad():  # in eval mode without: the fast path, which reads linear1.weight
            assert torch.allclose(layer(tokens), expected, atol=1e-5)
            masked = layer(tokens, src_key_padding_mask=padding)
            assert torch.allclose(masked[1, :4], dense(tokens, src_key_padding_mask=padding)[1, :4], atol=1e-5)


def test_a_transformer_encoder_works_in_both_modes():
    encoder = fill_(nn.TransformerEncoder(encoder_layer(), 2), 5)
    svd_compress_(encoder, 0.4)
    dense = restore_dense_(copy.deepcopy(encoder))
    tokens = randn(2, 7, 32, seed=0, dtype=torch.float32)
    for training in (True, False):
        with torch.no_grad():
            assert torch.allclose(encoder.train(training)(tokens), dense.train(training)(tokens), atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True}, {"batch_first": True}])
def test_multihead_attention_stays_whole_beside_compressed_layers(kwargs):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, **kwargs)
            self.linear = nn.Linear(32, 256)

    model = fill_(Block(), 4)
    sizes = [32, kwargs.get("kdim", 32), kwargs.get("vdim", 32)]
    query, key, value = (randn(5, 5, size, seed=i, dtype=torch.float32) for i, size in enumerate(sizes))
    for training in (True, False):
        model.train(training)
        expected = model.attention(query, key, value)[0]
        again = copy.deepcopy(model)
        report = svd_compress_(again, 0.1)
        assert report["attention"].reason == "MultiheadAttention is not supported"
        assert report["attention.out_proj"].reason == "NonDynamicallyQuantizableLinear is not supported"
        assert torch.equal(again.attention(query, key, value)[0], expected)
        with torch.no_grad():
            assert torch.allclose(again.attention(query, key, value)[0], expected, atol=1e-6)


def test_a_torchvision_model_loads_again_bit_for_bit():
    torch.manual_seed(0)
    model = models.mobilenet_v3_small(weights=None).eval()
    svd_compress_(model, 0.5)
    torch.manual_seed(1)
    again = load_compressed_(models.mobilenet_v3_small(weights=None), model.state_dict()).eval()
    images = randn(2, 3, 64, 64, seed=0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
