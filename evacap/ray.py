"""Captions of many files on many machines, by Ray Data."""

import io
import json
import os
from typing import TYPE_CHECKING, Any

from .commands.caption import BATCH_SIZE, caption


if TYPE_CHECKING:
    import pyarrow


class Captioner:
    """Captions batches of files, for `Dataset.map_batches`.

    A file that cannot be read becomes a row with an error, also if it crashes the process that reads it. Each row of a
    batch keeps its columns, except `bytes`, and gets three more: `text`, `error` (one of the two is null) and `result`,
    the JSON of what the pipeline returns.

    Args:
        model (`str`, *optional*): Model folder or Hub name. Defaults to the bundled checkpoint, which is for trying.
        column (`str`, defaults to `"path"`): The column with the names of the files. Their content is taken from the
            column `bytes` if there is one, as `ray.data.read_binary_files(…, include_paths=True)` makes it, from any
            object store; otherwise the names must be paths or addresses that each machine can open.
        batch_size (`int`, defaults to 8): Windows that go through the model at a time.
        num_workers (`int`, defaults to 2): Reading processes of an actor. With 0, a file that crashes the decoder costs
            its actor.
        options: Arguments of `pipeline`, such as `dtype` and `trust_remote_code`.
        call (`dict`, *optional*): Arguments of the pipeline's call, such as `num_beams` and `return_gate`.
    """

    def __init__(
        self,
        model: str | None = None,
        column: str = "path",
        batch_size: int = BATCH_SIZE,
        num_workers: int = 2,
        call: dict[str, Any] | None = None,
        **options: Any,
    ):
        # Otherwise the idle threads of the model spin on the cores that read.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from transformers import pipeline

        import evacap

        self.captioner = pipeline(evacap.TASK, model=model or evacap.TINY, **options)
        self.column, self.batch_size, self.num_workers, self.call = column, batch_size, num_workers, call or {}

    def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        """Captions the files of a batch.

        Args:
            batch (`pyarrow.Table`): Of `batch_format="pyarrow"`.

        Raises:
            TypeError: If the batch has another format.
            ValueError: If the column of the names is missing.
        """
        import pyarrow as pa

        if not isinstance(batch, pa.Table):
            raise TypeError(
                f"the batch is a {type(batch).__name__}, but a pyarrow.Table was expected: give batch_format='pyarrow'"
            )
        if self.column not in batch.column_names:
            raise ValueError(
                f"the batch has the columns {', '.join(batch.column_names)}, and not {self.column!r}: name the one of the "
                "files in fn_constructor_kwargs={'column': …}"
            )
        media = batch[self.column].to_pylist()
        if "bytes" in batch.column_names:
            media = [NamedBytes(name, content.as_py()) for name, content in zip(media, batch["bytes"])]
            batch = batch.drop_columns("bytes")
        results: list[dict[str, Any]] = []
        caption(
            self.captioner,
            media,
            lambda file, result: results.append(result),
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            **self.call,
        )
        for name in ("text", "error"):
            batch = batch.append_column(name, pa.array([result.get(name) for result in results], pa.string()))
        return batch.append_column("result", pa.array(map(json.dumps, results), pa.string()))


class NamedBytes(io.BytesIO):
    """The content of a file, which goes by its name in messages."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return NamedBytes, (self.name, self.getvalue())
