"""A script: gives up what a program could do harm with, then becomes the program's interpreter (see ``sandbox``).

``python -I -S fence.py ISOLATE SECONDS MEMORY ROOT``, the job on stdin, the verdict on stdout. With ISOLATE 1 (Linux)
the program gets namespaces of its own: its file system is ROOT, in memory and read-only, with the interpreter and the
system's libraries in it; it sees no other process, no network and no device but ``/dev/null`` and its like; it is
nobody, without capabilities and without a way to any. It is the first process of its own, so that whatever it leaves
behind dies with it.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    1 << bit for bit in (17, 26, 27, 28, 29, 30)
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1 << 1, 1 << 2, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR, READ_ONLY_NOSUID = 442, 1 | 2  # the same call and flags on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
"""Where interpreters and libraries lie; all of it may be read by anybody."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
UNAVAILABLE = 96
"""Exit code where the system has no such namespaces, or grants none."""


def main(isolate: bool, seconds: int, memory: int, root: Path) -> None:
    """Fence this process in and become the runner."""
    interpreter = os.path.realpath(sys.executable)
    runner = Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
    if isolate:
        try:
            separate(root)
        except (OSError, AttributeError):  # no permission, an old kernel, another libc
            os._exit(UNAVAILABLE)
    elif os.geteuid() == 0:
        become_nobody_if_possible()
    limit_resources(seconds, memory)
    os.execv(interpreter, [interpreter, "-I", "-S", "-c", runner])


def separate(root: Path) -> None:
    """Go on as the first process of new namespaces, on a file system of our own, as nobody."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    call("unshare", spaces | (CLONE_NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")
    ready, tell = os.pipe()
    if (child := os.fork()) != 0:
        os.close(tell)
        wait_for(child, is_fenced=os.read(ready, 1) == b"1")
    change_root(root)
    if not uid:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.write(tell, b"1")
    os.close(ready)
    os.close(tell)


def wait_for(child: int, is_fenced: bool) -> None:
    """End as the child does; what it failed at before the program began is told by ``UNAVAILABLE``."""
    os.close(1)  # so that the verdict's end is the child's
    _, status = os.waitpid(child, 0)
    os._exit(min(os.waitstatus_to_exitcode(status) & 0xFF, UNAVAILABLE - 1) if is_fenced else UNAVAILABLE)


def change_root(root: Path) -> None:
    """Make ``root`` the file system: what the interpreter needs of the old one, read-only, and nothing else."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", bytes(root), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=1m")
    for place in (*SYSTEM, *DEVICES, os.path.realpath(sys.base_prefix)):
        show(place, root)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID)  # attr_set, attr_clr, propagation, userns_fd
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(32))


def show(place: str, root: Path) -> None:
    """Make one file or folder of the old file system visible below the new root."""
    target = root / place[1:]
    if not os.path.lexists(place) or os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(place):
        target.symlink_to(Path(place).readlink())
        return
    if os.path.isdir(place):
        target.mkdir()
    else:
        target.touch()
    call("mount", place.encode(), bytes(target), None, MS_BIND | MS_REC, None)


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def become_nobody_if_possible() -> None:
    """Give up root where nobody can read the interpreter."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if readable:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def limit_resources(seconds: int, memory: int) -> None:
    """Set limits that the program cannot raise."""
    limits = {"CPU": seconds, "FSIZE": 0, "CORE": 0, "NPROC": 64, "AS": memory, "DATA": memory}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS knows the name and refuses
            resource.setrlimit(kind, (least, least))


if __name__ == "__main__":
    main(sys.argv[1] == "1", int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
