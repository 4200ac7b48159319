# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: the device's work of a call without the host's."""

import torch

from diffusers_dq.benchmark.timing import Call


def captured(call: Call) -> Call:
    """A replay of `call`, whose inputs must stay where they are. Raises what the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(keep: Call = call) -> None:  # whatever `call` holds has to outlive the graph
        graph.replay()

    return replay
