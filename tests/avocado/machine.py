# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process with its QMP connection, serial port and logs."""

import asyncio
import logging
import socket
import subprocess
import threading
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient, QMPError

# Seconds for an answer, or for QEMU to start or to end. Emulated machines are slow.
ANSWER_LIMIT = 120


def is_message(record):
    """Is this log record a QMP message, and not about the connection's state?"""
    return str(record.msg).startswith(("--> ", "<-- "))


class MachineError(Exception):
    """QEMU or its guest did not do what it should."""


class Machine:
    """QEMU, from its start until `close`.

    Its folder gets `qemu.log` (command line, output, errors), `serial.log` (what the guest says) and `qmp.log` (all
    messages).
    """

    def __init__(self, folder, command):
        self.folder = Path(folder)
        self.serial_log = self.folder / "serial.log"
        self.qemu_log = self.folder / "qemu.log"
        self.qmp_log = self.folder / "qmp.log"
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient()
        self._handler = logging.FileHandler(self.qmp_log)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._handler.addFilter(is_message)
        logger = logging.getLogger("qemu.qmp")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self._handler)
        self.process = None
        self._serial = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._start(command)

    def _start(self, command):
        ours, theirs = socket.socketpair()
        command = list(command) + [
            "-chardev", f"socket,id=qmp0,fd={theirs.fileno()}", "-qmp", "chardev:qmp0",
            # A pipe: a file that QEMU writes and this program reads has shown zeros for text where it lay on 9p.
            "-chardev", "file,id=serial0,path=/proc/self/fd/1", "-serial", "chardev:serial0",
            # So that nothing stays when a test is ended from outside.
            "-run-with", "exit-with-parent=on",
        ]
        with theirs, open(self.qemu_log, "w", encoding="utf-8") as log:
            print(*command, file=log, flush=True)
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, pass_fds=[theirs.fileno()]
            )
        self._listener.start()
        try:
            self._wait(self._client.connect(ours), ANSWER_LIMIT, "greet on QMP")
        except MachineError:
            self.close()
            raise

    def _listen(self):
        """Keeps what the guest says, until QEMU has ended."""
        with open(self.serial_log, "wb", buffering=0) as log:
            while said := self.process.stdout.read1(4096):
                log.write(said)
                self._serial += said

    def _wait(self, coroutine, limit, what):
        """Runs a coroutine; `what` says in errors what QEMU did not do."""
        try:
            return self._loop.run_until_complete(asyncio.wait_for(coroutine, limit))
        except asyncio.TimeoutError:
            raise MachineError(f"QEMU did not {what} within {limit} s") from None
        except (QMPError, OSError, EOFError) as error:
            if isinstance(error, ExecuteError):
                raise
            raise MachineError(f"QEMU did not {what}: {error}; {self.last_words()}") from error

    def last_words(self):
        """How QEMU ended, if it has, and the last line of its log."""
        try:
            ending = f"it ended with status {self.process.wait(1)}"
        except subprocess.TimeoutExpired:
            ending = "it runs"
        lines = self.qemu_log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{ending}, and said: {lines[-1] if len(lines) > 1 else 'nothing'}"

    def qmp(self, command, **arguments):
        """Runs a command. Underscores in names of arguments stand for hyphens."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._wait(self._client.execute(command, arguments), ANSWER_LIMIT, f"answer {command}")
        except ExecuteError as error:
            raise MachineError(f"{command} {arguments} was refused: {error}") from error

    def refusal(self, command, **arguments):
        """The text of the error that a command must give."""
        try:
            answer = self.qmp(command, **arguments)
        except MachineError as error:
            if isinstance(error.__cause__, ExecuteError):
                return str(error.__cause__)
            raise
        raise MachineError(f"{command} {arguments} was not refused but answered {answer}")

    def event(self, *names, limit):
        """The next event of one of these names; events before it are passed over."""

        async def wait():
            while True:
                event = await self._client.events.get()
                if event["event"] in names:
                    return event

        return self._wait(wait(), limit, f"send {' or '.join(names)}")

    def serial(self):
        """What the guest has said so far."""
        return self._serial.decode("utf-8", errors="replace")

    def quit(self):
        """Ends QEMU, and returns its exit status."""
        self.qmp("quit")
        try:
            status = self.process.wait(ANSWER_LIMIT)
            self._listener.join(ANSWER_LIMIT)
            return status
        except subprocess.TimeoutExpired:
            raise MachineError(f"QEMU did not end within {ANSWER_LIMIT} s after quit") from None

    def close(self):
        """Ends QEMU if it runs, and everything around it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._listener.join(ANSWER_LIMIT)
        try:
            self._loop.run_until_complete(self._client.disconnect())
        except (QMPError, OSError, EOFError):
            pass  # QEMU has gone, which is why the connection has.
        self._loop.close()
        logging.getLogger("qemu.qmp").removeHandler(self._handler)
        self._handler.close()
