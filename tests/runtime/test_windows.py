"""Windows, simulated: what its Python has not is taken away, what its system refuses is refused, and the commands still work.

There is no Windows here: this shows that nothing asks for what is known to be missing there, not that torch runs.
"""

from __future__ import annotations

import json

import lab

WINDOWS = '''
"""What Python has not, and what the system refuses, on Windows; then train.py and the others as they are."""
import errno, io, json, os, runpy, signal, sys

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import torch  # imports of others are done as they will
for name in ("fork", "sched_getaffinity", "sched_setaffinity", "posix_fallocate", "getuid", "geteuid", "O_NOFOLLOW", "O_DIRECTORY",
             "O_NONBLOCK", "sysconf", "killpg", "getpgid", "setsid", "fchmod", "pread", "pwrite"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD"):
    if hasattr(signal, name):
        delattr(signal, name)
folder_open, fsync = os.open, os.fsync

def no_folders(path, flags, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return folder_open(path, flags, *args, **more)

def only_written(handle):
    import ctypes
    if not ctypes.CDLL(None).fcntl(handle, 3) & 3:  # F_GETFL: opened to read
        raise OSError(errno.EBADF, "Bad file descriptor")
    fsync(handle)

def unmapped(call, *checked):
    def careful(*paths, **more):
        with io.open("/proc/self/maps") as maps:
            mapped = {line.split(None, 5)[-1].strip() for line in maps}
        for number in checked:
            real = os.path.realpath(paths[number]) if "dir_fd" not in more else ""
            if real in mapped:
                raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", paths[number])
        return call(*paths, **more)
    return careful

os.open, os.fsync = no_folders, only_written
os.replace, os.rename, os.unlink, os.remove = unmapped(os.replace, 0, 1), unmapped(os.rename, 0, 1), unmapped(os.unlink, 0), \
    unmapped(os.remove, 0)
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, argv
'''


def test_commands_work_without_what_windows_has_not(tmp_path, dataset, worlds):
    script, runs = tmp_path / "windows.py", lab.Lab(tmp_path, dataset)
    script.write_text(WINDOWS)

    config, prune, run = str(runs.config("run")), "checkpointing.keep_training_states=2", str(tmp_path / "run")
    (tmp_path / "text.txt").write_text("a text\n" * 200)
    commands = [["train.py", config, prune, "training.stop_at_step=10"], ["train.py", config, prune],
                ["evaluate.py", run, "evaluation.metrics=[val]"], ["sample.py", run, "--tokens", "4", "--prompt", "1 2"],
                ["analyze.py", run], ["shards.py", "verify", str(dataset)], ["export.py", "hf", run, str(tmp_path / "out")],
                ["shards.py", "text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "made"), "--row-length", "17"]]
    told = lab.run(script, json.dumps([[str(lab.ROOT / name), *words] for name, *words in commands]), timeout=300)
    for said in ("resumed at step 10", "val loss", "measures of 5 steps", "rows are as the index says", "made/train: "):
        assert said in told, told
    assert runs.metrics("run") == worlds.metrics("single")
