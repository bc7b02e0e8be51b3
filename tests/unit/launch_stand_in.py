"""A rank that saves when it is told to stop: sleeps through the import, then handles SIGTERM, and takes its time."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

folder, import_s, save_s = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
rank, asked = os.environ["RANK"], []
(folder / f"started_{rank}").touch()
time.sleep(import_s)
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
(folder / f"handling_{rank}").touch()
while not asked:
    time.sleep(0.02)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(save_s)
(folder / f"saved_{rank}").touch()
