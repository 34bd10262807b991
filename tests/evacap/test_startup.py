"""What `import evacap` costs and what holds after it, in processes of their own."""

import subprocess
import sys
from importlib import metadata

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

import evacap


# The package's own classes, not the copies of them that travel with a checkpoint.
CHECK = """
def check(*objects):
    for item in objects:
        assert type(item).__module__.startswith("evacap."), type(item)
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""
ORDERS = {
    "package first": """
import evacap
from transformers import AutoModel, AutoProcessor, pipeline
model, processor = AutoModel.from_pretrained(evacap.TINY), AutoProcessor.from_pretrained(evacap.TINY)
check(model, processor, pipeline(evacap.TASK, model=model, processor=processor))
""",
    "Auto classes first": """
from transformers import AutoModel
import evacap
check(AutoModel.from_pretrained(evacap.TINY))
""",
    "pipeline alone": """
import evacap, transformers
check(transformers.pipeline("audio-visual-captioning", model=evacap.TINY))
""",
    "configuration alone": """
import transformers, evacap
check(transformers.AutoConfig.from_pretrained(evacap.TINY))
assert transformers.AutoTokenizer.from_pretrained(evacap.TINY).vocab_size > 10
""",
    # `transformers.modeling_layers` imports the Auto classes before it defines what our model imports from it.
    "in the middle of another import": """
import evacap
import transformers.modeling_layers
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM
check(AutoModelForSeq2SeqLM.from_pretrained(evacap.TINY))
""",
    "pipelines first": """
from transformers.pipelines import pipeline
import evacap.modeling_evacap.configuration_evacap
check(pipeline(evacap.TASK, model=evacap.TINY))
""",
    "model's module alone": """
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
import evacap, transformers
model = EVACapForConditionalGeneration.from_pretrained(evacap.TINY)
check(model, transformers.AutoModel.from_config(model.config), transformers.AutoFeatureExtractor.from_pretrained(evacap.TINY))
""",
    "parts alone carry their code": """
import tempfile
from pathlib import Path
import evacap
for name in ("EVACapConfig", "EVACapFeatureExtractor", "EVACapVideoProcessor"):
    with tempfile.TemporaryDirectory() as folder:
        getattr(evacap, name)().save_pretrained(folder)
        assert [*Path(folder).glob("*_evacap.py")], name
""",
    "in a worker": """
import multiprocessing
def work(processor, config):
    import evacap, transformers
    assert type(transformers.AutoModel.from_config(config)).__module__.startswith("evacap.")
if __name__ == "__main__":
    import evacap, transformers
    parts = [auto.from_pretrained(evacap.TINY) for auto in (transformers.AutoProcessor, transformers.AutoConfig)]
    worker = multiprocessing.get_context("spawn").Process(target=work, args=parts)
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
""",
}
FAST = ("package first", "Auto classes first", "in the middle of another import")


def run(code: str, folder) -> str:
    script = folder / "script.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=name, marks=() if name in FAST else pytest.mark.slow) for name, code in ORDERS.items()],
)
def test_the_auto_classes_know_evacap(code, tmp_path):
    run(f"import sys\n{CHECK}\n{code}", tmp_path)


def test_the_package_alone_imports_next_to_nothing(tmp_path):
    code = """
import sys
import evacap
assert set(evacap.__all__) <= set(dir(evacap))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"transformers", "torch", "numpy", "av", "tqdm"}, loaded
from evacap.cli import main
for call in (["--version"], ["--help"], ["caption", "--help"]):
    try:
        main(call)
    except SystemExit as stopped:
        assert stopped.code == 0
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"transformers", "torch", "numpy", "av", "tqdm"}, loaded
"""
    assert f"evacap {metadata.version('evacap')}\n" in run(code, tmp_path)


def test_public_names():
    for name in evacap.__all__:
        assert getattr(evacap, name) is not None
    assert evacap.EVACapConfig is evacap.EVACapModel.config_class
    with pytest.raises(AttributeError, match="has no attribute 'EVACapNothing'"):
        evacap.EVACapNothing  # noqa: B018


class FilledElements(TorchDispatchMode):
    """Counts the elements of real tensors that initialisers fill."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("normal_", "uniform_", "fill_", "zero_"):
            self.count += args[0].numel() * (args[0].device.type != "meta")
        return function(*args, **(kwargs or {}))


def test_a_checkpoint_loads_without_initialising_first():
    with FilledElements() as filled:
        AutoModel.from_config(AutoConfig.from_pretrained(evacap.TINY))
    assert filled.count > 1e6
    with FilledElements() as filled:
        AutoModel.from_pretrained(evacap.TINY)
    assert filled.count == 0
