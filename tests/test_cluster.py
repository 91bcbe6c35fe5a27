"""Merges spread over workers that die: process pools, and a dask cluster."""
import os, signal
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
import pytest
import torch

from subspace_nb.stream import Journal, merge_files, partial_folder
from test_stream import models, reference, same

class Killing(Executor):
    "Another executor, and a process that is killed when the `at`-th parameter is handed out."
    def __init__(self, inner, pid, at): self.inner, self.pid, self.at = inner, pid, at
    def submit(self, fn, *args):
        self.at -= 1
        if not self.at: os.kill(self.pid, signal.SIGKILL)
        return self.inner.submit(fn, *args)

def test_a_pool_whose_worker_is_killed_says_so_and_resumes(models, tmp_path):
    base, experts = models
    with ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        executor = Killing(pool, pool.submit(os.getpid).result(), 10)
        with pytest.raises(RuntimeError, match='executor: a worker died .* goes on from there'): merge_files(base, experts, tmp_path/'out', device='cpu', executor=executor)
    assert not (tmp_path/'out').exists()
    done = len(Journal(partial_folder(tmp_path/'out')).done)
    same(merge_files(base, experts, tmp_path/'out', device='cpu'), reference(base, experts, 'task_arithmetic'))
    assert done<len(reference(base, experts, 'task_arithmetic')) and not partial_folder(tmp_path/'out').exists()

def test_dask_with_a_worker_killed(models, tmp_path):
    "Two worker processes on the loopback, one killed in mid-run: its work goes to the other, the file is right in every bit."
    distributed = pytest.importorskip('distributed', reason='dask.distributed is not installed (pip install distributed)')
    base, experts = models
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host='127.0.0.1', dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        client.run(torch.set_num_threads, 1)
        pids = list(client.run(os.getpid).values())
        executor = Killing(client.get_executor(), pids[0], 12)
        merge_files(base, experts, tmp_path/'out', 'tsv_m', device='cpu', executor=executor)
        assert executor.at<0 and pids[0] not in client.run(os.getpid).values()
    same(tmp_path/'out', reference(base, experts, 'tsv_m'))
