"""Transformers' `ModelTesterMixin` on EVACap; run by `make test-transformers`."""

import unittest
import unittest.mock
from typing import ClassVar

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from evacap import EVACapConfig, EVACapForConditionalGeneration, EVACapModel


class EVACapModelTester:
    batch_size = 3
    fusion: ClassVar[dict[str, object]] = {}
    frames, mel_bins, patch_size = 64, 32, 16
    video_frames, image_size = 4, 32
    vocab_size, seq_length = 99, 7
    is_training = True
    # What the outputs have: of the encoder, those of a tower and of the joint blocks.
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    num_joint_layers = 1
    # Audio tokens: what the joint blocks and the decoder's prefix see.
    encoder_seq_length = (mel_bins // patch_size) * (frames // patch_size)
    decoder_seq_length = seq_length

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> EVACapConfig:
        tower = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers - self.num_joint_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
        }
        return EVACapConfig(
            audio_config={**tower, "num_mel_bins": self.mel_bins, "max_frames": self.frames},
            video_config={**tower, "image_size": self.image_size, "num_frames": self.video_frames},
            text_config={
                **tower,
                "num_hidden_layers": self.num_hidden_layers,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            decoder_start_token_id=1,
            num_joint_layers=self.num_joint_layers,
            **self.fusion,
            # The tests compare with plain cross-entropy, which AVCap's smoothed loss is without smoothing.
            label_smoothing=0.0,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_features": floats_tensor([self.batch_size, self.frames, self.mel_bins]),
            "pixel_values_videos": floats_tensor(
                [self.batch_size, self.video_frames, 3, self.image_size, self.image_size]
            ),
            "decoder_input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=3),
            "decoder_attention_mask": random_attention_mask([self.batch_size, self.seq_length]).fill_(1),
        }


class EVACapModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (EVACapModel, EVACapForConditionalGeneration)
    # The mixin of `generate` is not in the source distribution; `tests/modeling_evacap` has tests of it.
    all_generative_model_classes = ()
    is_encoder_decoder = True
    _is_composite = True
    # These tests need `input_ids`; `tests/modeling_evacap` has one of its own.
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = EVACapModelTester(self)
        # What the tests of training and of the loss go by, for the models that Transformers ships.
        for names, model_class in (
            (MODEL_MAPPING_NAMES, EVACapModel),
            (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, EVACapForConditionalGeneration),
        ):
            patch = unittest.mock.patch.dict(names, {EVACapConfig.model_type: model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

    def _audio_features_get_expected_num_attentions(self, model_tester=None):
        return self.model_tester.num_hidden_layers - self.model_tester.num_joint_layers

    def _audio_features_get_expected_num_hidden_states(self, model_tester=None):
        return self._audio_features_get_expected_num_attentions() + 1

    _video_features_get_expected_num_attentions = _audio_features_get_expected_num_attentions
    _video_features_get_expected_num_hidden_states = _audio_features_get_expected_num_hidden_states

    def test_attention_outputs(self):
        # The gate and its entropy are two outputs more than the test counts.
        self.model_tester.fusion = {"fusion_type": "audio_only"}
        super().test_attention_outputs()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is EVACapForConditionalGeneration:
            inputs["labels"] = torch.zeros(
                (self.model_tester.batch_size, self.model_tester.seq_length), dtype=torch.long
            )
        return inputs


class EVACapAdaptiveModelTest(EVACapModelTest):
    """The decoder that reads sound and picture as two memories."""

    def setUp(self):
        super().setUp()
        self.model_tester.num_joint_layers = 0
        self.model_tester.fusion = {"fusion_type": "concat", "text_fusion": "adaptive"}

    def test_attention_outputs(self):
        self.skipTest(
            "The confidence is one output more than the test counts; `tests/modeling_evacap/test_adaptive_evacap.py` looks at "
            "the attentions."
        )
