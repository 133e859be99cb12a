"""Architectures of the package ``transformers``, tiny ones, built from a configuration: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from testbed.torchvision_import import import_torchvision
from testbed.zoo.entry import Entry, noise, tokens
from testbed.zoo.transformers_layers import register_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

_VOCABULARY = 120
_LENGTH = 12


@dataclass(frozen=True)
class _Recipe:
    """How to build one model.

    Attributes:
        model: name of the class of the model.
        config: name of the class of its configuration.
        feed: makes the keyword arguments of a call.
        options: what is set in the configuration.
    """

    model: str
    config: str
    feed: Callable[[], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def _text() -> dict[str, Any]:
    """Two sentences, the second one shorter."""
    mask = torch.ones(2, _LENGTH, dtype=torch.int64)
    mask[1, _LENGTH - 4 :] = 0
    return {"input_ids": tokens(2, _LENGTH, vocabulary=_VOCABULARY), "attention_mask": mask}


def _text_alone() -> dict[str, Any]:
    return {"input_ids": tokens(2, _LENGTH, vocabulary=_VOCABULARY)}


def _text_to_text() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": tokens(2, 7, vocabulary=_VOCABULARY, seed=1)}


def _images() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, 32, 32)}


def _images_of_64() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, 64, 64)}


def _captions() -> dict[str, Any]:
    return {**_text(), **_images()}


def _spectrograms() -> dict[str, Any]:
    return {"input_features": noise(2, 80, 40), "decoder_input_ids": tokens(2, 7, vocabulary=_VOCABULARY, seed=1)}


def _sound() -> dict[str, Any]:
    return {"input_values": noise(2, 4000)}


# What an encoder of the kind of BERT is told.
_ENCODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 32,
}
# What a decoder of the kind of Llama is told; its embeddings are not tied to its head, which would keep both dense.
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "use_cache": False, "tie_word_embeddings": False, "pad_token_id": 0}
_PATCHES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
_TWO_TOWERS = {
    "vocab_size": _VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "num_feat_extract_layers": 3,
}
# Experts are kept in weights of three axes, which stay dense: large heads leave enough besides.
_EXPERTS = {
    **_DECODER,
    "head_dim": 128,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
# The published models' tokens are beyond the few words here.
_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_RECIPES = {
    "bert": _Recipe("BertForSequenceClassification", "BertConfig", _text, _ENCODER),
    "roberta": _Recipe("RobertaForTokenClassification", "RobertaConfig", _text, _ENCODER),
    "albert": _Recipe("AlbertModel", "AlbertConfig", _text, {**_ENCODER, "embedding_size": 32}),
    "electra": _Recipe("ElectraForSequenceClassification", "ElectraConfig", _text, {**_ENCODER, "embedding_size": 32}),
    "deberta_v2": _Recipe(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", _text,
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "distilbert": _Recipe(
        "DistilBertForSequenceClassification", "DistilBertConfig", _text,
        {"vocab_size": _VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256,
         "max_position_embeddings": 32},
    ),
    "modernbert": _Recipe(
        "ModernBertForSequenceClassification", "ModernBertConfig", _text,
        {**_ENCODER, **_SPECIAL_TOKENS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "gpt2": _Recipe(
        "GPT2LMHeadModel", "GPT2Config", _text,
        {"vocab_size": _VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False,
         "tie_word_embeddings": False, **_SPECIAL_TOKENS},
    ),
    "opt": _Recipe(
        "OPTForCausalLM", "OPTConfig", _text,
        {**_DECODER, "ffn_dim": 256, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    "bloom": _Recipe(
        "BloomForCausalLM", "BloomConfig", _text,
        {"vocab_size": _VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False,
         "tie_word_embeddings": False},
    ),
    "gpt_neox": _Recipe("GPTNeoXForCausalLM", "GPTNeoXConfig", _text, {**_DECODER, "rotary_pct": 0.5}),
    "llama": _Recipe("LlamaForCausalLM", "LlamaConfig", _text, _DECODER),
    "mistral": _Recipe("MistralForCausalLM", "MistralConfig", _text, {**_DECODER, "sliding_window": 4}),
    "gemma": _Recipe("GemmaForCausalLM", "GemmaConfig", _text, {**_DECODER, "head_dim": 16}),
    "qwen2": _Recipe("Qwen2ForCausalLM", "Qwen2Config", _text, _DECODER),
    "qwen3": _Recipe("Qwen3ForCausalLM", "Qwen3Config", _text, {**_DECODER, "head_dim": 16}),
    "phi": _Recipe("PhiForCausalLM", "PhiConfig", _text, _DECODER),
    "falcon": _Recipe("FalconForCausalLM", "FalconConfig", _text, {**_DECODER, **_SPECIAL_TOKENS}),
    "mixtral": _Recipe("MixtralForCausalLM", "MixtralConfig", _text, _EXPERTS),
    "qwen3_moe": _Recipe(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _text, _EXPERTS,
    ),
    "mamba": _Recipe(
        "MambaForCausalLM", "MambaConfig", _text_alone,
        {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False,
         "tie_word_embeddings": False},
    ),
    "mamba2": _Recipe(
        "Mamba2ForCausalLM", "Mamba2Config", _text_alone,
        {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
         "n_groups": 2, "state_size": 16, "chunk_size": 4, "use_cache": False, "tie_word_embeddings": False},
    ),
    "rwkv": _Recipe(
        "RwkvForCausalLM", "RwkvConfig", _text_alone,
        {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False,
         "tie_word_embeddings": False},
    ),
    "t5": _Recipe(
        "T5ForConditionalGeneration", "T5Config", _text_to_text,
        {"vocab_size": _VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4,
         "use_cache": False, "decoder_start_token_id": 0, "tie_word_embeddings": False},
    ),
    "bart": _Recipe(
        "BartForConditionalGeneration", "BartConfig", _text_to_text, {**_TWO_TOWERS, "max_position_embeddings": 32},
    ),
    "marian": _Recipe(
        "MarianMTModel", "MarianConfig", _text_to_text, {**_TWO_TOWERS, "max_position_embeddings": 32},
    ),
    "whisper": _Recipe(
        "WhisperForConditionalGeneration", "WhisperConfig", _spectrograms,
        {**_TWO_TOWERS, "num_mel_bins": 80, "max_source_positions": 20, "max_target_positions": 16},
    ),
    "wav2vec2": _Recipe("Wav2Vec2ForCTC", "Wav2Vec2Config", _sound, _SPEECH),
    "hubert": _Recipe("HubertForCTC", "HubertConfig", _sound, _SPEECH),
    "wavlm": _Recipe("WavLMForCTC", "WavLMConfig", _sound, _SPEECH),
    "vit": _Recipe("ViTForImageClassification", "ViTConfig", _images, _PATCHES),
    "deit": _Recipe("DeiTForImageClassification", "DeiTConfig", _images, _PATCHES),
    "beit": _Recipe("BeitForImageClassification", "BeitConfig", _images, _PATCHES),
    "dinov2": _Recipe("Dinov2ForImageClassification", "Dinov2Config", _images, _PATCHES),
    "swin": _Recipe(
        "SwinForImageClassification", "SwinConfig", _images,
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": _Recipe(
        "ConvNextForImageClassification", "ConvNextConfig", _images_of_64,
        {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
    ),
    "segformer": _Recipe(
        "SegformerForSemanticSegmentation", "SegformerConfig", _images_of_64,
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64, "num_labels": 6},
    ),
    "clip": _Recipe(
        "CLIPModel", "CLIPConfig", _captions,
        {"text_config": {**_ENCODER, **_SPECIAL_TOKENS}, "vision_config": _PATCHES,
         "projection_dim": 32},
    ),
    "siglip": _Recipe(
        "SiglipModel", "SiglipConfig", _captions,
        {"text_config": {**_ENCODER, **_SPECIAL_TOKENS}, "vision_config": _PATCHES},
    ),
    "vilt": _Recipe("ViltModel", "ViltConfig", _captions, {**_ENCODER, **_PATCHES}),
}  # fmt: skip


def transformers_entries() -> Iterator[Entry]:
    """Yield an entry for every recipe; the package is imported when one is built."""
    for name, recipe in _RECIPES.items():
        yield _entry(name, recipe)


def _entry(name: str, recipe: _Recipe) -> Entry:
    def build() -> nn.Module:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with contextlib.suppress(ModuleNotFoundError):
            import_torchvision()  # transformers imports it, where it is there
        transformers = importlib.import_module("transformers")
        register_layers(transformers)
        config = getattr(transformers, recipe.config)(**recipe.options)
        model: nn.Module = getattr(transformers, recipe.model)(config)
        return model

    return Entry(f"transformers/{name}", "transformers", build, lambda _: ((), recipe.feed()))
