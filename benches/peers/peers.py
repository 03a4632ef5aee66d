"""Runs one peer on vectors that the bench wrote, on one thread, and prints what it measured: lines of `name value`.

    peers.py PEER DIR K        PEER: numpy, hnswlib, faiss, usearch, qdrant

DIR has `about.json` (rows, queries, dimension, users), `base.f32`, `query.f32` and, of each query, its true K nearest rows in
`truth.u32`. Row i belongs to user i mod users, and has the tag i div users mod 100; query i asks for user i mod users.
"""

import json
import os
import shutil
import sys
import time

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

M, EF_CONSTRUCTION = 16, 200
EFS = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384]


def resident():
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def say(name, value):
    print(name, value, flush=True)


def recall(found, truth):
    hits = sum(len(set(map(int, a)) & set(map(int, b))) for a, b in zip(found, truth))
    return hits / truth.size


def best_of(runs, work):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def graph(build, search, base, queries, truth):
    """Builds, then looks for the smallest ef that reaches the recall."""
    before = resident()
    start = time.perf_counter()
    index = build(base)
    say("build_s", time.perf_counter() - start)
    reached = 0.0
    for ef in EFS:
        seconds, found = best_of(3, lambda: search(index, queries, ef))
        reached = max(reached, recall(found, truth))
        if reached >= 0.99:
            say("ef", ef)
            break
    say("recall", reached)
    say("rate", len(queries) / seconds)
    say("bytes", resident() - before)


def main():
    peer, directory, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(f"{directory}/about.json") as about:
        about = json.load(about)
    dimension, users = about["dimension"], about["users"]
    base = np.fromfile(f"{directory}/base.f32", np.float32).reshape(-1, dimension)
    queries = np.fromfile(f"{directory}/query.f32", np.float32).reshape(-1, dimension)
    truth = np.fromfile(f"{directory}/truth.u32", np.uint32).reshape(-1, k)

    if peer == "numpy":
        block, one = np.ascontiguousarray(base[:1000]), queries[0]
        out = np.empty(1000, np.float32)
        say("product_s", min(best_of(2000, lambda: np.dot(block, one, out=out))[0] for _ in range(3)))

    elif peer == "hnswlib":
        import hnswlib

        def build(base):
            index = hnswlib.Index("ip", dimension)
            index.init_index(len(base), M=M, ef_construction=EF_CONSTRUCTION)
            index.add_items(base, num_threads=1)
            return index

        def search(index, queries, ef):
            index.set_ef(ef)
            return index.knn_query(queries, k, num_threads=1)[0]

        graph(build, search, base, queries, truth)

    elif peer == "faiss":
        import faiss

        faiss.omp_set_num_threads(1)

        def build(base):
            index = faiss.IndexHNSWFlat(dimension, M, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = EF_CONSTRUCTION
            index.add(base)
            return index

        def search(index, queries, ef):
            index.hnsw.efSearch = ef
            return index.search(queries, k)[1]

        graph(build, search, base, queries, truth)

    elif peer == "usearch":
        from usearch.index import Index

        def build(base):
            index = Index(ndim=dimension, metric="ip", connectivity=M, expansion_add=EF_CONSTRUCTION)
            index.add(np.arange(len(base)), base, threads=1)
            return index

        def search(index, queries, ef):
            index.expansion_search = ef
            return index.search(queries, k, threads=1).keys

        graph(build, search, base, queries, truth)

    elif peer == "qdrant":
        import qdrant_edge as q

        path = f"{directory}/qdrant"
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        # Each tenant gets a small graph of its own, as its makers advise for many tenants.
        hnsw = q.HnswIndexConfig(m=0, payload_m=M, ef_construct=EF_CONSTRUCTION, full_scan_threshold=10_000)
        vectors = {"": q.EdgeVectorParams(size=dimension, distance=q.Distance.Dot)}
        shard = q.EdgeShard.create(path, q.EdgeConfig(vectors=vectors, hnsw_config=hnsw, max_search_threads=1))
        update = q.UpdateOperation
        shard.update(update.create_field_index("user", q.KeywordIndexParams(is_tenant=True)))
        shard.update(update.create_field_index("tag", q.PayloadSchemaType.Integer))
        start = time.perf_counter()
        for first in range(0, len(base), 1000):
            rows = range(first, min(first + 1000, len(base)))
            payload = lambda row: {"user": f"u{row % users}", "tag": row // users % 100}
            points = [q.Point(row, base[row].tolist(), payload(row)) for row in rows]
            shard.update(update.upsert_points(points))
        shard.optimize()
        say("build_s", time.perf_counter() - start)
        lists = [query.tolist() for query in queries]

        def ask(filtered):
            times, found = [], []
            for number, query in enumerate(lists):
                must = [q.FieldCondition("user", match=q.MatchValue(f"u{number % users}"))]
                if filtered:
                    must.append(q.FieldCondition("tag", match=q.MatchValue(number % 100)))
                request = q.QueryRequest(limit=k, query=q.Query.Nearest(query), filter=q.Filter(must=must), with_payload=True)
                start = time.perf_counter()
                points = shard.query(request)
                times.append(time.perf_counter() - start)
                found.append([point.id for point in points])
            return sorted(times), found

        for name, filtered in [("scoped", False), ("filtered", True)]:
            ask(filtered)
            times, found = ask(filtered)
            say(f"{name}_p50_s", times[len(times) // 2])
            say(f"{name}_p99_s", times[len(times) * 99 // 100])
            say(f"{name}_rate", len(times) / sum(times))
            if not filtered:
                say("recall", recall(found, truth))

    else:
        sys.exit(f"there is no peer {peer}")


main()
