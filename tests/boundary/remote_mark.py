"""In a network namespace of its own, beside another one: who may come by a mark from there?

Run by `unshare --net`.  Writes JSON: how many clients of the other namespace got in without a mark
and with one, how many each of two sockets was given, and the same of a client here.
"""

import json
import socket
import subprocess
import sys

from socketprotector.system import bpf, reuseport

COUNT = 20
HERE, THERE = "10.99.0.1", "10.99.0.2"

if len(sys.argv) > 1:  # there
    port, source = int(sys.argv[1]), sys.argv[2]
    got_in = [0, 0]
    for number in range(2 * COUNT):
        with socket.socket() as client:
            client.settimeout(0.1 if number % 2 else 5)
            if number % 2:
                client.bind((source, 0))
            try:
                client.connect((HERE, port))
            except OSError:
                continue
            got_in[number % 2] += 1
    print(json.dumps(got_in))
    sys.exit()


def run(*words: object) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def accepted(listening: socket.socket) -> int:
    count = 0
    while True:
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


STAYS = ("unshare", "--net", "sh", "-c", "echo; exec sleep 1000")

with subprocess.Popen(STAYS, stdout=subprocess.PIPE) as other:
    try:
        assert other.stdout is not None
        other.stdout.readline()  # now it is there
        there = ("nsenter", "--target", other.pid, "--net")
        run(
            "ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", other.pid
        )
        for name, address, words in (("here", HERE, ()), ("there", THERE, there)):
            run(*words, "ip", "address", "add", f"{address}/24", "dev", name)
            run(*words, "ip", "link", "set", name, "up")
            run(*words, "ip", "link", "set", "lo", "up")
        for name in ("all", "there"):  # it does all that it can to send from such an address
            setting = f"/proc/sys/net/ipv4/conf/{name}/route_localnet"
            run(*there, "sh", "-c", f"echo 1 > {setting}")
        with socket.create_server(("0.0.0.0", 0), backlog=100) as first:
            first.setblocking(False)
            second = reuseport.make(first)
            assert second is not None
            mark = bpf.Mark.draw("127.0.0.1")
            reuseport.steer(first, 0, {mark: 1})
            port = first.getsockname()[1]
            got_in = json.loads(run(*there, sys.executable, __file__, port, mark.source))
            came = [accepted(first), accepted(second)]
            with socket.socket() as ours:
                mark.put(ours)
                ours.connect((HERE, port))
                print(json.dumps([got_in, came, [accepted(first), accepted(second)]]))
    finally:
        other.kill()
