"""A log made here, with odd lines planted in it: what `docs/anomalies.md` and `benchmarks/anomalies.py` read.

    python benchmarks/synthetic_log.py --lines 6000 --seed 1 > normal.log
    python benchmarks/synthetic_log.py --lines 3000 --seed 2 --odd 3 > today.log

The places of the planted lines and their kinds go to standard error.
"""

import argparse
import random
import sys
from collections.abc import Callable

USERS = ("anna", "boris", "carol", "deploy", "erik", "backup")
PATHS = ("/", "/login", "/api/v1/items", "/api/v1/users", "/static/app.js", "/static/style.css", "/health")
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64)",
    "curl/8.5.0",
    "kube-probe/1.29",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_4)",
)
JOBS = ("run-parts /etc/cron.hourly", "/usr/bin/certbot renew -q", "/usr/local/bin/backup --all")
UNITS = ("logrotate.service", "apt-daily.service", "man-db.service", "fstrim.service")


def address(draw: random.Random) -> str:
    return f"10.0.{draw.randrange(4)}.{draw.randrange(1, 255)}"


def process(name: str, draw: random.Random) -> str:
    return f"{name}[{draw.randrange(900, 9999)}]:"


def session(draw: random.Random) -> str:
    user, port = draw.choice(USERS), draw.randrange(32768, 61000)
    how = draw.choice(("Accepted publickey", "Accepted publickey", "Failed password"))
    return f"{process('sshd', draw)} {how} for {user} from {address(draw)} port {port} ssh2"


def request(draw: random.Random) -> str:
    path, status = draw.choice(PATHS), draw.choice((200, 200, 200, 200, 304, 404))
    size = draw.randrange(120, 40000)
    return f'nginx: {address(draw)} "GET {path} HTTP/1.1" {status} {size} "{draw.choice(AGENTS)}"'


def job(draw: random.Random) -> str:
    return f"{process('CRON', draw)} (root) CMD ({draw.choice(JOBS)})"


def unit(draw: random.Random) -> str:
    name = draw.choice(UNITS)
    return f"systemd[1]: {name}: Deactivated successfully, {draw.randrange(10, 900)}ms CPU time."


def query(draw: random.Random) -> str:
    table, rows = draw.choice(("items", "users", "orders", "events")), draw.randrange(1, 500)
    return f"{process('postgres', draw)} SELECT on {table} returned {rows} rows in {draw.random() * 80:.3f} ms"


NORMAL: tuple[Callable[[random.Random], str], ...] = (session, request, request, request, job, unit, query, query)


def injected(draw: random.Random) -> str:
    attack = draw.choice(("?id=1%27%20OR%201=1--", "/../../etc/passwd"))
    return request(draw).replace(" HTTP", f"{attack} HTTP")


def encoded(draw: random.Random) -> str:
    payload = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=32))
    return job(draw).replace("CMD (", f"CMD (echo {payload} | base64 -d; ")


def out_of_memory(draw: random.Random) -> str:
    number, size = draw.randrange(900, 9999), draw.randrange(10**6)
    return f"kernel: Out of memory: Killed process {number} (postgres) total-vm:{size}kB"


def cut_short(draw: random.Random) -> str:
    line = request(draw)
    return line[: len(line) // 2]


def foreign_address(draw: random.Random) -> str:
    return session(draw).replace("from 10.0.", "from 203.113.")


def unknown_user(draw: random.Random) -> str:
    return f"{process('sshd', draw)} Failed password for invalid user oracle from {address(draw)} port 22 ssh2"


def slow(draw: random.Random) -> str:
    milliseconds = draw.randrange(10**5, 10**6)
    return f"{process('postgres', draw)} SELECT on orders returned 3 rows in {milliseconds}.125 ms"


def wrong_status(draw: random.Random) -> str:
    head, tail = request(draw).split('HTTP/1.1" ')
    return f'{head}HTTP/1.1" {draw.choice((500, 502))}{tail[3:]}'


ODD: tuple[Callable[[random.Random], str], ...] = (
    injected,
    encoded,
    out_of_memory,
    cut_short,
    foreign_address,
    unknown_user,
    slow,
    wrong_status,
)


def log(lines: int, seed: int, odd: int = 0) -> tuple[list[str], dict[int, str]]:
    """The lines of a log, and the planted ones: their number from 1, and their kind; `odd` of each kind."""
    draw = random.Random(seed)
    planted = dict(zip(draw.sample(range(lines // 10 + 1, lines + 1), odd * len(ODD)), ODD * odd, strict=True))
    second, found = 8 * 3600, []
    for number in range(1, lines + 1):
        second += draw.choice((0, 0, 1, 1, 2, 5))
        day, clock = 3 + second // 86400, second % 86400
        stamp = f"May {day:2d} {clock // 3600:02d}:{clock // 60 % 60:02d}:{clock % 60:02d} web1 "
        make = planted.get(number) or draw.choice(NORMAL)
        found.append(stamp + make(draw))
    return found, {number: make.__name__ for number, make in sorted(planted.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--odd", type=int, default=0, help="planted lines of each kind")
    options = parser.parse_args()
    lines, planted = log(options.lines, options.seed, options.odd)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    for number, kind in planted.items():
        print(f"line {number}: {kind}", file=sys.stderr)


if __name__ == "__main__":
    main()
