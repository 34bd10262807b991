"""Transformers' mixins of processor, video processor and feature extractor on EVACap; run by `make test-transformers`."""

import unittest
import unittest.mock

import numpy as np
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin
from tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs
from transformers import BertTokenizer

from evacap import EVACapFeatureExtractor, EVACapProcessor, EVACapVideoProcessor


WORDS = ["lower", "newer", "upper", "older", "longer", "string", "a", "dog", "barks"]


class EVACapProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = EVACapProcessor
    # Text is what the model learns to say.
    text_input_name = "labels"

    @classmethod
    def setUpClass(cls):
        # Saved classes name their code, which the tests do not expect of classes that Transformers ships.
        for part in (EVACapProcessor, EVACapFeatureExtractor, EVACapVideoProcessor):
            patch = unittest.mock.patch.object(part, "_auto_class", None)
            patch.start()
            cls.addClassCleanup(patch.stop)
        super().setUpClass()

    def test_model_input_names(self):
        """The mask comes only where a frame is missing, and labels are not among the model's input names."""
        processor = self.get_processor()
        inputs = processor(
            text=self.prepare_text_inputs(),
            videos=self.prepare_videos_inputs(),
            audio=self.prepare_audio_inputs(),
            do_sample_frames=False,
            return_tensors="pt",
        )
        self.assertSetEqual(set(inputs), {*processor.model_input_names, "labels"} - {"pixel_values_videos_mask"})

    def prepare_images_inputs(self, batch_size=None):
        """No stills: the tests pass all that they have at once, and stills stand in the place of a video."""

    @classmethod
    def _setup_feature_extractor(cls):
        return EVACapFeatureExtractor(feature_size=32, max_frames=64)

    @classmethod
    def _setup_video_processor(cls):
        return EVACapVideoProcessor(num_frames=4, size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!?" for prefix in ("", "##")]
        tokens = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *WORDS,
            *(word for word in letters if word not in WORDS),
        ]
        return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


class EVACapVideoProcessorTester:
    batch_size, num_channels, num_frames = 3, 3, 4
    crop_size = {"height": 18, "width": 18}

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, self.crop_size["height"], self.crop_size["width"]


class EVACapVideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = EVACapVideoProcessor
    input_name = "pixel_values_videos"

    def setUp(self):
        super().setUp()
        self.video_processor_tester = EVACapVideoProcessorTester()

    def test_call_sample_frames(self):
        self.skipTest(
            "A clip with fewer frames than the model takes is not an error here: frames come more than once."
        )

    @property
    def video_processor_dict(self):
        return {
            "num_frames": 4,
            "size": {"shortest_edge": 20},
            "crop_size": EVACapVideoProcessorTester.crop_size,
            # With tubelets of two frames the processor rounds the number of frames up, which the tests do not expect.
            "tubelet_size": 1,
        }


class EVACapFeatureExtractionTester:
    batch_size, min_seq_length, max_seq_length, feature_size = 3, 40, 200, 24
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def prepare_feat_extract_dict(self):
        return {"feature_size": self.feature_size, "max_frames": 64}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = [self.max_seq_length] * self.batch_size
        if not equal_length:
            lengths = list(range(self.min_seq_length, self.max_seq_length + 1, self.seq_length_diff))
        rng = np.random.default_rng(0)
        waveforms = [rng.standard_normal((length, self.feature_size)) for length in lengths]
        return waveforms if numpify else [waveform.tolist() for waveform in waveforms]


class EVACapFeatureExtractorTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = EVACapFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = EVACapFeatureExtractionTester()
