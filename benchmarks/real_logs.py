"""Logs of real programs with faults, labelled: what `benchmarks/anomaly_logs.py` reads from `benchmarks/data/logs`.

    apt-get update
    apt-get download fail2ban nginx openssh-server redis-server redis-tools libwrap0 libjemalloc2 liblzf1
    for package in *.deb; do dpkg -x $package programs; done
    python3 benchmarks/real_logs.py --programs programs --output benchmarks/data/logs

Needs Debian with the packages above unpacked (none is installed), postgresql, openssh-client and dpkg. Run it as a user
that is not root and has a shell; it needs no package of Python. All traffic goes to 127.0.0.1. It takes some minutes.

Each program is driven by one action after the other, and what it writes during an action belongs to it. The first
`NORMAL` of the actions are normal; after that some are faults. Of nginx every line of a fault is labelled, also one
that differs in the status alone. A fault of the other programs writes usual lines as well, such as that of the
connection; there a line is labelled if no normal action wrote it, with its numbers left out. fail2ban ships the logs
that its filters are tested on; the lines that a filter has to match are labelled.

The logs of fail2ban are under its licence (GPL) and are not kept here; `--only fail2ban` copies them from the package.

A file holds one line for each line of a log: its kind, `-` where it is normal, a tab, and the line.
"""

import argparse
import contextlib
import fcntl
import http.server
import itertools
import json
import lzma
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Share of the actions before the first fault, and how often one is a fault after that.
NORMAL, FAULTS = 0.6, 0.08
HOST = "127.0.0.1"
Labelled = list[tuple[str, str]]


class Growth:
    """What programs add to their logs. entries: (kind, line) so far."""

    def __init__(self, *paths: Path):
        self._paths, self._read = paths, dict.fromkeys(paths, 0)
        self.entries: Labelled = []

    def lines(self, path: Path) -> list[str]:
        """Complete lines that were added since the last call."""
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read[path])
            complete, _, _ = file.read().rpartition(b"\n")
        if not complete:
            return []
        self._read[path] += len(complete) + 1
        return complete.decode(errors="replace").split("\n")

    def take(self, kind: str, quiet: float, most: float = 2.0) -> int:
        """Give a kind to all lines until nothing was added for `quiet` seconds; how many there were."""
        found, ends, last = 0, time.monotonic() + most, time.monotonic()
        while time.monotonic() < min(ends, last + quiet):
            for path in self._paths:
                if added := self.lines(path):
                    self.entries += [(kind, line) for line in added]
                    found, last = found + len(added), time.monotonic()
            time.sleep(0.004)
        return found

    def await_lines(self, kind: str, path: Path, count: int = 1, most: float = 2.0) -> None:
        """Give a kind to all lines until `count` were added to `path`, which is written last."""
        ends, found = time.monotonic() + most, 0
        while found < count and time.monotonic() < ends:
            last = self.lines(path)
            for other in self._paths:
                if other != path and last:
                    self.entries += [(kind, line) for line in self.lines(other)]
            self.entries += [(kind, line) for line in last]
            found += len(last)
            time.sleep(0.001)


def actions(count: int, draw: random.Random, faults: list[str]) -> Iterator[str]:
    """The kinds of `count` actions, `-` where normal. Faults take turns, each once or a few times in a row."""
    number, turns = 0, itertools.cycle(faults)
    while number < count:
        if number >= NORMAL * count and draw.random() < FAULTS:
            kind = next(turns)
            for _ in range(draw.choice((1, 1, 2, 4))):
                yield kind
                number += 1
        yield "-"
        number += 1


def only_new(entries: Labelled) -> Labelled:
    """Labels for those lines alone that no normal action wrote, numbers left out."""

    def form(line: str) -> str:
        return re.sub(r"\b[0-9a-fA-F]*[0-9][0-9a-fA-F]*\b", "0", line)

    usual = {form(line) for kind, line in entries if kind == "-"}
    return [("-" if form(line) in usual else kind, line) for kind, line in entries]


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def send(port: int, content: bytes, wait: float = 1.0) -> bytes:
    """Send bytes and return what comes back until the other side closes, or `wait` seconds are over."""
    got = b""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=wait) as link:
        link.sendall(content)
        while block := link.recv(65536):
            got += block
    return got


def await_port(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)
    raise SystemExit(f"Nothing answers on port {port}; look into the log of the program.")


# --- nginx

NGINX = """
daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log info;
events {{ worker_connections 128; }}
http {{
  log_format timed '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent '
    '"$http_referer" "$http_user_agent" rt=$request_time ua="$upstream_addr" us="$upstream_status"';
  access_log {place}/access.log timed;
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
  uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
  types {{ text/html html; text/css css; application/javascript js; image/png png; }}
  server {{
    listen {host}:{port}; root {place}/www; server_tokens off; client_max_body_size 8k;
    location /api/ {{ proxy_pass http://{host}:{upstream}; proxy_connect_timeout 1s; proxy_read_timeout 1s; }}
    location = /old {{ return 301 /index.html; }}
  }}
}}
"""
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/129.0 Safari/537.36",
    "curl/7.88.1",
    "Go-http-client/1.1",
)
SCANNED = (
    "/wp-login.php", "/.env", "/.git/config", "/phpmyadmin/index.php", "/admin/config.php", "/cgi-bin/test.cgi",
    "/backup.zip", "/server-status", "/xmlrpc.php", "/vendor/phpunit/src/Util/PHP/eval-stdin.php",
)  # fmt: skip
CLIMBING = (
    "/../../etc/passwd", "/static/../../../etc/shadow", "/%2e%2e/%2e%2e/etc/passwd", "/img/..%2f..%2f..%2fetc/hosts",
    "/....//....//etc/passwd",
)  # fmt: skip


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with numbers; slowly where it is asked to."""

    def do_GET(self) -> None:
        if "slow" in self.path:
            time.sleep(1.3)
        body = json.dumps({"path": self.path, "values": [1, 2, 3] * (len(self.path) % 7)}).encode()
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing: nginx logs."""


def nginx(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """The access log and the error log, as they are written."""
    port, upstream = free_port(), free_port()
    (place / "www" / "static").mkdir(parents=True)
    names = ["index.html", "about.html", "contact.html", "static/app.js", "static/style.css", "static/logo.png"]
    for name in names:
        (place / "www" / name).write_bytes(draw.randbytes(draw.randrange(200, 9000)))
    (place / "nginx.conf").write_text(NGINX.format(place=place, host=HOST, port=port, upstream=upstream))

    def serve() -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer((HOST, upstream), Upstream)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def request(path: str, method: str = "GET", body: bytes = b"", more: str = "") -> bytes:
        referer = draw.choice(("", "", f"Referer: http://{HOST}/index.html\r\n"))
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: {draw.choice(AGENTS)}\r\n{referer}{more}"
        return head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    def usual() -> bytes:
        choice = draw.random()
        if choice < 0.5:
            return request("/" + draw.choice(names), more=draw.choice(("", "", "Range: bytes=0-99\r\n")))
        if choice < 0.9:
            kind, number = draw.choice(("items", "users", "orders")), draw.randrange(1, 5000)
            return request(f"/api/{kind}/{number}" + draw.choice(("", f"?page={draw.randrange(20)}")))
        if choice < 0.95:
            return request("/api/login", "POST", b"user=anna")
        return request(draw.choice(("/old", "/favicon.ico", "/robots.txt")))

    def fault(kind: str) -> bytes:
        if kind == "scan":
            return request(draw.choice(SCANNED))
        if kind == "traversal":
            return request(draw.choice(CLIMBING))
        if kind == "injection":
            return request(f"/api/items/{draw.randrange(99)}?id=1%27%20UNION%20SELECT%20{draw.randrange(9)}--")
        if kind == "malformed":
            hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(20)
            desktop = b"\x03\x00\x00/*\xe0\x00\x00\x00\x00\x00"
            return draw.choice((hello, b"HELO mail", b"GET", desktop)) + b"\r\n\r\n"
        if kind == "large":
            return request("/api/login", "POST", b"x" * 9000)
        if kind == "method":
            return request("/" + draw.choice(names), draw.choice(("PROPFIND", "TRACE", "DELETE", "CONNECT")))
        if kind == "slow":
            return request(f"/api/slow/{draw.randrange(99)}")
        return request(f"/api/items/{draw.randrange(5000)}")  # while the upstream is down

    grown = Growth(place / "error.log", place / "access.log")
    run = [programs / "usr/sbin/nginx", "-p", place, "-c", place / "nginx.conf", "-e", place / "error.log"]
    server = serve()
    with running(run):
        await_port(port)
        grown.take("-", 0.3)
        grown.entries.clear()
        kinds = ["scan", "traversal", "injection", "malformed", "large", "method", "slow", "down"]
        for kind in actions(6000, draw, kinds):
            if kind == "down":
                server.shutdown()
                server.server_close()
            send(port, usual() if kind == "-" else fault(kind), 3.0)
            grown.await_lines(kind, place / "access.log")
            if kind == "down":
                server = serve()
    server.shutdown()
    server.server_close()
    return grown.entries


# --- sshd

SSHD = """
Port {port}
ListenAddress {host}
HostKey {place}/host_key
PidFile {place}/pid
AuthorizedKeysFile {place}/authorized
StrictModes no
UsePAM no
PasswordAuthentication yes
LogLevel VERBOSE
MaxAuthTries 3
LoginGraceTime 2
Subsystem sftp internal-sftp
"""


def sshd(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """What it writes to standard error, at the level VERBOSE."""
    port, log = free_port(), place / "log"
    for name in ("host_key", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    (place / "authorized").write_text((place / "key.pub").read_text())
    (place / "config").write_text(SSHD.format(port=port, host=HOST, place=place))
    ask = place / "ask"
    ask.write_text("#!/bin/sh\necho wrong\n")
    ask.chmod(0o700)
    environment = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "none"}
    fixed = ["-F", "none", "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={place}/known"]
    own = os.environ.get("USER") or subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()

    def ssh(user: str, *options: str, command: str = "true") -> None:
        line = ["ssh", *fixed, *options, f"{user}@{HOST}", command]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(line, env=environment, timeout=20, check=False, **quiet)

    keyed = ["-i", str(place / "key"), "-o", "IdentitiesOnly=yes", "-o", "PreferredAuthentications=publickey"]
    typed = ["-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=2"]

    def act(kind: str) -> None:
        if kind == "-":
            ssh(own, *keyed, command=draw.choice(("true", "uptime", "ls /", "cat /etc/hostname", "df")))
        elif kind == "password":
            ssh(own, *typed)
        elif kind == "unknown":
            ssh(draw.choice(("admin", "test", "oracle", "ubuntu", "pi", "guest")), *typed)
        elif kind == "key":
            ssh(own, "-i", str(place / "stranger"), *keyed[2:])
        elif kind == "root":
            ssh("root", *keyed)
        elif kind == "cipher":
            ssh(own, *keyed, "-o", "Ciphers=3des-cbc")
        elif kind == "exchange":
            ssh(own, *keyed, "-o", "KexAlgorithms=diffie-hellman-group1-sha1")
        elif kind == "protocol":
            send(port, draw.choice((b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\r\n", b"SSH-1.5-scan\r\n",
                                    b"SSH-2.0-" + b"A" * 300 + b"\r\n", b"\x00" * 40 + b"\n")), 0.3)  # fmt: skip
        elif kind == "closed":
            with contextlib.suppress(OSError), socket.create_connection((HOST, port)) as link:
                link.sendall(draw.choice((b"", b"SSH-2.0-libssh2_1.4.3\r\n")))

    grown = Growth(log)
    with log.open("wb") as errors, running([programs / "usr/sbin/sshd", "-D", "-e", "-f", place / "config"], errors):
        await_port(port)
        grown.take("-", 0.5)
        grown.entries.clear()
        kinds = ["password", "unknown", "key", "root", "cipher", "exchange", "protocol", "closed"]
        for kind in actions(400, draw, kinds):
            act(kind)
            grown.take(kind, 0.06)
    return only_new(grown.entries)


# --- redis

REDIS = """
bind {host}
port {port}
dir {place}/data
logfile {place}/log
loglevel verbose
save 1 20
appendonly yes
maxclients 40
daemonize no
"""


def redis(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """Its log at the level verbose: clients, snapshots, rewrites; killed and restarted under load."""
    port, data, log = free_port(), place / "data", place / "log"
    data.mkdir()
    (place / "redis.conf").write_text(REDIS.format(host=HOST, port=port, place=place))
    program: list[str | Path] = [programs / "usr/bin/redis-server", place / "redis.conf"]
    server = subprocess.Popen(program)
    await_port(port)
    grown = Growth(log)
    grown.take("-", 0.3)
    grown.entries.clear()

    def command(*words: bytes | str) -> bytes:
        given = [word.encode() if isinstance(word, str) else word for word in words]
        return b"*%d\r\n" % len(given) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in given)

    def visit(*commands: bytes) -> None:
        send(port, b"".join(commands) + command("QUIT"))

    def writes() -> list[bytes]:
        return [command("SET", f"k{draw.randrange(900)}", draw.randbytes(draw.randrange(9, 90))) for _ in range(40)]

    def act(kind: str) -> None:
        nonlocal server
        if kind == "-":
            choice = draw.random()
            if choice < 0.06:
                visit(command("BGSAVE"))
            elif choice < 0.1:
                visit(command("BGREWRITEAOF"))
            else:
                visit(*writes()[: draw.randrange(1, 40)])
        elif kind == "killed":
            server.send_signal(signal.SIGKILL)
            server.wait()
            server = subprocess.Popen(program)
            await_port(port)
        elif kind == "cut":  # the last command of the append-only file is not whole
            visit(*writes())
            server.send_signal(signal.SIGKILL)
            server.wait()
            for part in (data / "appendonlydir").glob("*.incr.aof"):
                os.truncate(part, max(part.stat().st_size - 7, 0))
            server = subprocess.Popen(program)
            await_port(port)
        elif kind == "disk":  # no snapshot can be written
            data.chmod(0o500)
            visit(*writes(), command("BGSAVE"))
            time.sleep(0.3)
            data.chmod(0o700)
        elif kind == "protocol":
            send(port, draw.choice((b"*1\r\n$99999999999\r\n", b"*-9x\r\n", b"*2\r\nnothing\r\n")), 0.3)
        elif kind == "attack":
            send(port, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", 0.3)
        elif kind == "crowd":  # more clients than are let in
            links = [socket.create_connection((HOST, port)) for _ in range(42)]
            time.sleep(0.1)
            for link in links:
                link.close()
        elif kind == "debug":
            visit(command("CONFIG", "SET", "maxmemory", "1mb"), *writes(), command("CONFIG", "SET", "maxmemory", "0"))

    kinds = ["killed", "cut", "disk", "protocol", "attack", "crowd", "debug"]
    try:
        for kind in actions(1500, draw, kinds):
            act(kind)
            grown.take(kind, 0.03 if kind == "-" else 0.3)
    finally:
        server.terminate()
        server.wait()
    return only_new(grown.entries)


# --- postgres


def postgres(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """Its log with statements and durations: a load of small transactions; errors, killed processes, a restart."""
    del programs  # the one that is installed
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        raise SystemExit("Install postgresql first.")
    tools, port, data, log = found[-1], free_port(), place / "data", place / "log"
    subprocess.run([tools / "initdb", "-A", "trust", "-D", data, "-U", "app"], check=True, stdout=subprocess.DEVNULL)
    settings = {
        "listen_addresses": HOST, "port": port, "unix_socket_directories": place, "log_connections": "on",
        "log_disconnections": "on", "log_min_duration_statement": 0, "log_line_prefix": "%m [%p] %q%u@%d ",
        "deadlock_timeout": "50ms", "log_checkpoints": "on", "checkpoint_timeout": "30s", "fsync": "off",
        "max_connections": 12, "log_lock_waits": "on",
    }  # fmt: skip
    with (data / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    (data / "pg_hba.conf").write_text("host all app 127.0.0.1/32 trust\n")
    errors = log.open("ab")
    server = subprocess.Popen([tools / "postgres", "-D", data], stdout=errors, stderr=errors)

    def ready() -> None:
        for _ in range(300):
            told = subprocess.run([tools / "pg_isready", "-q", "-h", HOST, "-p", str(port), "-U", "app"], check=False)
            if told.returncode == 0:
                return
            time.sleep(0.05)

    def begin(*statements: str, user: str = "app", base: str = "postgres") -> "subprocess.Popen[bytes]":
        line = [tools / "psql", "-q", "-h", HOST, "-p", str(port), "-U", user, "-d", base, "-f", "-"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        client = subprocess.Popen(line, stdin=subprocess.PIPE, **quiet)
        client.stdin.write("".join(f"{text};\n" for text in statements).encode())
        client.stdin.flush()
        return client

    def run(*statements: str, user: str = "app", base: str = "postgres") -> None:
        with contextlib.suppress(BrokenPipeError):
            begin(*statements, user=user, base=base).communicate(timeout=20)

    def usual() -> list[str]:
        made = []
        for _ in range(draw.randrange(2, 9)):
            number, amount = draw.randrange(1, 300), draw.randrange(-500, 500)
            made += draw.choice((
                [f"SELECT balance FROM accounts WHERE id = {number}"],
                [f"UPDATE accounts SET balance = balance + {amount} WHERE id = {number}"],
                [f"INSERT INTO history (account, amount) VALUES ({number}, {amount})"],
                ["BEGIN", f"UPDATE accounts SET balance = balance - {amount} WHERE id = {number}", "COMMIT"],
                [f"SELECT count(*) FROM history WHERE account = {number}"],
            ))  # fmt: skip
        return made

    def act(kind: str) -> None:
        nonlocal server
        number = draw.randrange(1, 300)
        if kind == "-":
            run(*usual())
        elif kind == "syntax":
            injected = f"SELECT 1 FROM accounts WHERE name = '{number}' OR '1'='1'"
            wrong = (f"SELEC balance FROM accounts WHERE id = {number}", "SELECT nothing FROM accounts")
            run(draw.choice((*wrong, "SELECT * FROM acounts", injected)))
        elif kind == "constraint":
            run(draw.choice((f"INSERT INTO accounts (id, balance) VALUES ({number}, 0)",
                             f"INSERT INTO history (account, amount) VALUES ({number + 5000}, 1)",
                             f"UPDATE accounts SET balance = NULL WHERE id = {number}")))  # fmt: skip
        elif kind == "timeout":
            run("SET statement_timeout = 60", "SELECT pg_sleep(0.2)")
        elif kind == "login":
            run("SELECT 1", user=draw.choice(("admin", "root", "postgres")))
        elif kind == "base":
            run("SELECT 1", base=draw.choice(("wordpress", "backup")))
        elif kind == "deadlock":
            first = begin("BEGIN", "UPDATE accounts SET balance = 1 WHERE id = 1", "SELECT pg_sleep(0.2)",
                          "UPDATE accounts SET balance = 1 WHERE id = 2", "COMMIT")  # fmt: skip
            run("BEGIN", "UPDATE accounts SET balance = 2 WHERE id = 2", "SELECT pg_sleep(0.2)",
                "UPDATE accounts SET balance = 2 WHERE id = 1", "COMMIT")  # fmt: skip
            first.communicate(timeout=20)
        elif kind == "crowd":
            crowd = [begin("SELECT pg_sleep(0.3)") for _ in range(14)]
            for client in crowd:
                with contextlib.suppress(BrokenPipeError):
                    client.communicate(timeout=20)
        elif kind == "killed":  # one process, which takes the others down
            client = begin("SELECT pg_sleep(9)")
            time.sleep(0.1)
            workers = subprocess.run(["pgrep", "-P", str(server.pid), "-f", "SELECT"], capture_output=True, text=True)
            for worker in workers.stdout.split():
                os.kill(int(worker), signal.SIGKILL)
            client.communicate(timeout=20)
            ready()
        elif kind == "crash":  # the whole server, restarted under load
            children = subprocess.run(["pgrep", "-P", str(server.pid)], capture_output=True, text=True).stdout.split()
            for process in [server.pid, *map(int, children)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            server.wait()
            server = subprocess.Popen([tools / "postgres", "-D", data], stdout=errors, stderr=errors)
            ready()
        elif kind == "protocol":
            send(port, draw.choice((b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\x00\x00")), 0.3)

    grown = Growth(log)
    try:
        ready()
        run("CREATE TABLE accounts (id int PRIMARY KEY, name text, balance int NOT NULL)",
            "INSERT INTO accounts SELECT n, 'name ' || n, 100 FROM generate_series(1, 300) AS n",
            "CREATE TABLE history (account int REFERENCES accounts, amount int)")  # fmt: skip
        grown.take("-", 0.3)
        grown.entries.clear()
        kinds = ["syntax", "constraint", "timeout", "login", "base", "deadlock", "crowd", "killed", "crash", "protocol"]
        for kind in actions(700, draw, kinds):
            act(kind)
            grown.take(kind, 0.03)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        errors.close()
    return only_new(grown.entries)


# --- dpkg


def dpkg(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """What dpkg says while it installs, upgrades and removes packages in a folder, without being root: its log and what
    it prints. The packages are empty, and have names and versions of those that are installed here."""
    del programs
    shown = ["dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture}\n"]
    known = [line.split() for line in subprocess.run(shown, capture_output=True, text=True).stdout.splitlines()]
    known = [one for one in known if one[0].startswith(("lib", "python3-", "perl"))]
    root, log, said = place / "root", place / "dpkg.log", place / "said"
    for folder in ("info", "updates", "triggers"):
        (root / "var/lib/dpkg" / folder).mkdir(parents=True)
    for file in ("status", "available"):
        (root / "var/lib/dpkg" / file).touch()
    said.touch()
    installed: dict[str, str] = {}

    def build(name: str, version: str, more: str = "", script: str = "", owns: str = "") -> Path:
        tree = Path(tempfile.mkdtemp(dir=place))
        tree.chmod(0o755)
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n{more}"
            f"Description: made for a log\n"
        )
        owned = tree / (owns or f"usr/share/doc/{name}/copyright")
        owned.parent.mkdir(parents=True)
        owned.write_text(name)
        if script:
            (tree / "DEBIAN" / "postinst").write_text(f"#!/bin/sh\n{script}\n")
            (tree / "DEBIAN" / "postinst").chmod(0o755)
        made = place / f"{name}_{version.replace(':', '%3a')}_all.deb"
        subprocess.run(["dpkg-deb", "-b", "--root-owner-group", tree, made], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree)
        return made

    def run(*arguments: object, cut: float = 0.0) -> None:
        line = ["dpkg", "--force-not-root", "--force-script-chrootless", "--force-bad-path", f"--root={root}",
                f"--log={log}", *map(str, arguments)]  # fmt: skip
        with said.open("ab") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output, env={**os.environ, "LC_ALL": "C"})
            if cut:
                time.sleep(cut)
                process.kill()
            process.wait()

    def act(kind: str) -> None:
        name, version, _ = draw.choice(known)
        if kind == "-":
            if name in installed and draw.random() < 0.4:
                run(draw.choice(("--remove", "--purge")), name)
                del installed[name]
                return
            if name in installed:
                version = f"{installed[name]}+b{draw.randrange(9)}"
            run("--install", build(name, version))
            installed[name] = version
        elif kind == "dependency":
            needed = draw.choice(known)[0] + "-missing"
            run("--install", build(f"{name}-extra", version, more=f"Depends: {needed} (>= {version})\n"))
            run("--purge", f"{name}-extra")
        elif kind == "script":
            script = draw.choice(("exit 1", "echo cannot reach the service >&2; exit 2", "kill -9 $$"))
            run("--install", build(f"{name}-service", version, script=script))
            run("--purge", f"{name}-service")
        elif kind == "damaged":
            made = build(name, version)
            content = made.read_bytes()
            made.write_bytes(content[: len(content) * draw.randrange(20, 90) // 100])
            run("--install", made)
        elif kind == "owned" and installed:  # a file that another package owns
            other = draw.choice(sorted(installed))
            run("--install", build(f"{name}-copy", version, owns=f"usr/share/doc/{other}/copyright"))
        elif kind == "conflict" and installed:
            other = draw.choice(sorted(installed))
            run("--install", build(f"{name}-rival", version, more=f"Conflicts: {other}\n"))
        elif kind == "absent":
            run("--install", place / f"{name}_{version}_all.deb.absent")
        elif kind == "locked":
            held = (root / "var/lib/dpkg/lock").open("w")
            fcntl.lockf(held, fcntl.LOCK_EX)
            run("--install", build(name, version))
            held.close()
        elif kind == "cut":
            run("--install", build(name, version), cut=0.02)
            run("--configure", "-a")
            run("--purge", name)
            installed.pop(name, None)

    grown = Growth(log, said)
    kinds = ["dependency", "script", "damaged", "owned", "conflict", "absent", "locked", "cut"]
    for kind in actions(600, draw, kinds):
        act(kind)
        grown.take(kind, 0.01)
        for made in place.glob("*.deb"):
            made.unlink()
    entries = [(kind, line.replace(f"{place}/", "/tmp/")) for kind, line in grown.entries]
    stems = "|".join(sorted((re.escape(one[0]) for one in known), key=len, reverse=True))
    names = re.compile(rf"({stems})(-extra|-service|-copy|-rival)?")
    # A usual line about another package is usual.
    marks = only_new([(kind, names.sub("NAME", line)) for kind, line in entries])
    return [(kind, line) for (kind, _), (_, line) in zip(marks, entries, strict=True)]


# --- fail2ban


def fail2ban(programs: Path, place: Path, draw: random.Random) -> Labelled:
    """The logs of some 95 services; first what is normal of the first half of each, then the other halves."""
    del place, draw
    (folder,) = programs.glob("usr/lib/python3/dist-packages/fail2ban/tests/files/logs")
    first, second = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        entries, matched = [], None
        for line in path.read_text(errors="replace").split("\n"):
            if line.startswith("#"):
                if found := re.search(r'"match"\s*:\s*(true|false)', line):
                    matched = found[1] == "true"
            elif line.strip():
                entries.append((path.name if matched else "-", line))
                matched = None
        half = len(entries) // 2
        first += [entry for entry in entries[:half] if entry[0] == "-"]
        second += entries[half:]
    return first + second


SOURCES: dict[str, Callable[[Path, Path, random.Random], Labelled]] = {
    "nginx": nginx, "sshd": sshd, "redis": redis, "postgres": postgres, "dpkg": dpkg, "fail2ban": fail2ban,
}  # fmt: skip


@contextlib.contextmanager
def running(command: list[object], errors: object = None) -> Iterator[None]:
    """A program that runs meanwhile."""
    process = subprocess.Popen([str(word) for word in command], stderr=errors)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def write(path: Path, entries: Labelled) -> None:
    content = "".join(f"{kind}\t{line}\n" for kind, line in entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True, help="where the packages were unpacked")
    parser.add_argument("--output", type=Path, required=True, help="a folder for NAME.log.xz")
    parser.add_argument("--only", nargs="*", choices=SOURCES, default=list(SOURCES))
    options = parser.parse_args()
    if os.getuid() == 0:
        raise SystemExit("Run this as another user than root; postgres and sshd are started with its rights.")
    programs = options.programs.resolve()
    libraries = [programs / folder / "x86_64-linux-gnu" for folder in ("lib", "usr/lib")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    for number, name in enumerate(options.only):
        with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as place:
            entries = SOURCES[name](programs, Path(place), random.Random(number))
        write(options.output / f"{name}.log.xz", entries)
        odd = sum(kind != "-" for kind, _ in entries)
        print(f"{name}: {len(entries)} lines, {odd} of faults", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
