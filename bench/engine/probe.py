"""Are the machine's CPUs really separate cores at this moment? Standard library only.

On a virtual machine two CPUs may at times be hyperthreads of one physical core: two threads then do
little more than one (matrix products and memory reads alike), and no steal time shows. The ratio of
two threads' SHA-256 rate to one thread's tells: about 2 when separate, 1.0 to 1.3 when shared.
"""

import hashlib, threading, time

_data = memoryview(bytes(16 << 20))


def _rate(n):
    best = 0.0
    for _ in range(2):
        ts = [threading.Thread(target=lambda: hashlib.sha256(_data).digest()) for _ in range(n)]
        t0 = time.perf_counter()
        for t in ts:
            t.start()
        for t in ts:
            t.join()
        best = max(best, n * len(_data) / (time.perf_counter() - t0) / 1e9)
    return best


def probe():
    one, two = _rate(1), _rate(2)
    return {"sha1_gbs": round(one, 2), "scaling": round(two / one, 2)}


if __name__ == "__main__":
    import sys

    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        print(time.strftime("%H:%M:%S"), probe(), flush=True)
        time.sleep(1)
