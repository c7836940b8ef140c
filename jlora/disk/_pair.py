"""Two files of a folder that change as one: the configuration of adapters, and their tensors.

Both new files are made first, under hidden names. Then the old configuration steps aside, the new tensors take the
place of the old ones, and the new configuration takes its own:

    adapter_config.json    adapter_model.safetensors    hidden
    old                    old                          new configuration, new tensors
    -                      old                          old configuration, new configuration, new tensors
    -                      new                          old configuration, new configuration
    new                    new                          old configuration

The two names never lead to two generations. While the tensors change there is no configuration, so that a reader that
knows these names alone, as PEFT's, refuses the folder. `Pair.opened` knows the hidden ones too and finds one whole
generation at every moment; a writer that was killed is tidied up by the next. All this is renames within the folder:
what else lies there, its own name, its owner and the folder above are not touched, and no file system is too simple.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jlora.disk._atomic import file_written_whole, remove_leftovers, sync_folder, write_whole
from jlora.disk._formats import found_instead
from jlora.disk._open import open_to_read, read_all, read_bytes, reason
from jlora.disk._safetensors import TensorFile
from jlora.errors import DataError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG = 16 << 20
_TRIES = 50


class Pair:
    """The two files in a folder.

    Args:
      folder: where they are.
      tensors: the name of the tensors' file. The hidden names tell pairs with other tensors apart.

    Attributes:
      config, tensors: where the files lie.
      old_config: where the configuration lies while the tensors are replaced.
    """

    def __init__(self, folder: str | Path, tensors: str = TENSORS) -> None:
        self.folder = Path(folder)
        self.config, self.tensors = self.folder / CONFIG, self.folder / tensors
        hidden = CONFIG if tensors == TENSORS else f"{CONFIG}.{tensors}"
        self.old_config = self.folder / f".{hidden}.jlora-old"
        self._new_config = self.folder / f".{hidden}.jlora-new"
        self._new_tensors = self.folder / f".{tensors}.jlora-new"

    def current_config(self) -> Path:
        """The configuration that the tensors at hand belong to, also where a writer was killed."""
        if os.path.lexists(self.config):
            return self.config
        if os.path.lexists(self._new_config) and not os.path.lexists(self._new_tensors):
            return self._new_config
        return self.old_config if os.path.lexists(self.old_config) else self.config

    def read_config(self) -> bytes:
        """The text of the configuration of the generation that is there."""
        for _ in range(_TRIES):
            before = self._seen()
            try:
                return read_bytes(self.current_config(), MOST_CONFIG)
            except DataError:
                if before == self._seen():
                    raise
        raise self._restless()

    def current(self) -> tuple[Path, Path]:
        """The configuration and the tensors of the generation that is there."""
        return self.current_config(), self.tensors

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[bytes, TensorFile]]:
        """The text of the configuration, and the tensors that belong to it.

        Raises:
          DataError: a file is missing, damaged, no regular one, or too large.
        """
        for _ in range(_TRIES):
            found = self._opened_once()
            if found is not None:
                with found[1]:
                    yield found
                return
        raise self._restless()

    def replace(self, config: bytes, write_tensors: Callable[[BinaryIO], None]) -> None:
        """Writes both files, or neither; for when no other writer is at work.

        Raises:
          DataError: the system refuses; what was there before is still there.
        """
        self.settle()
        try:
            # In this order: by the new tensors' hidden file readers know that the tensors are the old ones.
            with file_written_whole(self._new_tensors, like=self.tensors) as file:
                write_tensors(file)
            write_whole(self._new_config, config, like=self.config)
            if os.path.lexists(self.config):
                self._move(self.config, self.old_config)
            self._move(self._new_tensors, self.tensors)
            self._move(self._new_config, self.config)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {reason(error)}") from None
        finally:
            self.settle()

    def settle(self) -> None:
        """Ends a replacement that was cut off: all of it where the tensors are the new ones, else nothing of it.

        Raises:
          DataError: the system refuses; the files can still be read.
        """
        current = self.current_config()
        if current != self.config:
            try:
                self._move(current, self.config)
            except OSError as error:
                raise DataError(f"{current}: cannot be put in its place: {reason(error)}") from None
        for left in (self._new_config, self._new_tensors, self.old_config):
            with contextlib.suppress(OSError):
                os.unlink(left)
            remove_leftovers(left)

    def _move(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        sync_folder(self.folder)  # in this order on the disk too

    def _opened_once(self) -> tuple[bytes, TensorFile] | None:
        """Both files, None where they were replaced meanwhile."""
        before, config = self._seen(), self.current_config()
        try:
            with os.fdopen(open_to_read(config), "rb") as opened:
                text = read_all(opened, config, MOST_CONFIG)
                file = TensorFile(self.tensors)
                # Both are open, so that their numbers are not given to other files.
                after = self._seen()
                found = {config: _identity(opened.fileno()), self.tensors: _identity(file.fileno())}
                if before == after == after | found:
                    return text, file
                file.close()
        except DataError as error:
            if before == self._seen():
                instead = "" if os.path.lexists(self.tensors) else found_instead(self.folder, self.tensors.name)
                raise DataError(f"{error}; {instead}" if instead else str(error)) from None
        return None

    def _restless(self) -> DataError:
        return DataError(f"{self.folder}: was written again and again while it was read")

    def _seen(self) -> dict[Path, tuple[int, int] | None]:
        """What lies under each name."""
        names = (self.config, self.tensors, self._new_config, self._new_tensors, self.old_config)
        return {path: _identity(path) for path in names}


def _identity(file: Path | int) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
