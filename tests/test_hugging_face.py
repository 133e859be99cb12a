"""What ``save_pretrained`` writes of a compressed model, and who reads it."""

from __future__ import annotations

import pytest
import torch

import torchsmooth
from testbed.torchvision_import import import_torchvision
from tests.strategies import randn

import_torchvision()  # before transformers does, which would not declare what a CPU build lacks


@pytest.mark.parametrize("tied", [False, True])
def test_what_save_pretrained_writes_is_loaded_as_the_page_on_saving_says(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    for number, parameter in enumerate(model.parameters()):  # and no buffers, of which some are not saved
        parameter.data = 0.3 * randn(*parameter.shape, seed=number, dtype=torch.float32)
    tokens = torch.arange(12).reshape(2, 6)
    torchsmooth.svd_compress_(model, 0.2)
    with torch.no_grad():
        expected = model(tokens).logits
        for name, options in (("one", {}), ("several", {"max_shard_size": "20KB"})):
            model.save_pretrained(tmp_path / name, **options)
            assert len(list((tmp_path / name).glob("*.safetensors"))) > 1 or name == "one"
            config = transformers.AutoConfig.from_pretrained(tmp_path / name)
            again = transformers.AutoModelForCausalLM.from_config(config).eval()
            assert torch.equal(torchsmooth.load_compressed_(again, tmp_path / name)(tokens).logits, expected)
        random = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
        assert not torch.allclose(random(tokens).logits, expected, atol=1e-2)
        torchsmooth.restore_dense_(model).save_pretrained(tmp_path / "dense")
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        assert torch.allclose(dense(tokens).logits, expected, atol=1e-4)
