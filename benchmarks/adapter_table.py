"""Bottleneck adapters on real models and real data, as a table.

The tasks, the steps and what is measured are those of selective_table.py, so that the two tables compare. SparseAdapter
looks at 32 rows before it trains; AdaMix runs every batch twice (its consistency loss) and is measured with the mean of
its experts.

    python benchmarks/adapter_table.py --task messages --tune
    python benchmarks/adapter_table.py --wnut17 ../shared/data/wnut17
    python benchmarks/adapter_table.py --task messages "Pfeiffer"
"""

from __future__ import annotations

from selective_table import MINILM, Entry, main

ENTRIES: dict[str, Entry] = {
    "Head alone": Entry("FullConfig", 2e-3, {"target_modules": ["classifier"]}, MINILM),
    "Houlsby": Entry("HoulsbyConfig", 2e-3),
    "Pfeiffer": Entry("PfeifferConfig", 2e-3),
    "Parallel, scaled": Entry("ParallelConfig", 1e-3, {"reduction_factor": 16}),
    "Compacter": Entry("CompacterConfig", 3e-3, {}, MINILM),
    "Compacter++": Entry("CompacterPlusPlusConfig", 3e-3, {}, MINILM),
    "Compacter, d/16": Entry("CompacterConfig", 3e-3, {"reduction_factor": 16}, ("answers",)),  # 4 divides 36, not 18
    "Compacter++, d/16": Entry("CompacterPlusPlusConfig", 3e-3, {"reduction_factor": 16}, ("answers",)),
    "AdaMix": Entry("AdaMixConfig", 2e-3),
    "SparseAdapter, snip 40 %": Entry("SparseAdapterConfig", 2e-3, {"keep": 0.4}),
    "SparseAdapter, large 10 %": Entry("SparseAdapterConfig", 2e-3, {"keep": 0.1, "reduction_factor": 4}),
    "S4": Entry("S4Config", 2e-3),
    "MAM": Entry("MAMConfig", 2e-3, {"num_virtual_tokens": 10, "encoder_hidden_size": 128, "reduction_factor": 16}),
    "UniPELT": Entry("UniPELTConfig", 2e-3, {"encoder_hidden_size": 128}),
}

if __name__ == "__main__":
    main(ENTRIES, __doc__, "adapter_table.json")
