from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from helpers.rounding import rounding
from transformers import LlamaConfig, LlamaForCausalLM

from hmoe import HMoEForCausalLM
from hmoe.training.packing import MixedDataset, PackedDataset, PackedStream, flatten_batch, make_sequence


@pytest.mark.parametrize("within", [False, True])
def test_packed_sequences_are_slices_of_the_whole(within):
    rng = np.random.default_rng(0)
    sizes = [3, 0, 16, 1, 40, 5, 0, 0, 7, 25]
    documents = [rng.integers(0, 99, size).tolist() for size in sizes]
    parts = [datasets.Dataset.from_dict({"input_ids": documents[i : i + 3]}) for i in range(0, len(sizes), 3)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    whole = datasets.concatenate_datasets([part.cast(features) for part in parts])
    packed = PackedDataset(whole, 8, within=within)
    stream, position = (
        [token for document in documents for token in document],
        [i for size in sizes for i in range(size)],
    )
    assert len(packed) == len(stream) // 8
    for index, row in enumerate(packed):
        assert row["input_ids"].tolist() == stream[8 * index : 8 * index + 8]
        if within:
            expected, count = [], 0
            for here in position[8 * index : 8 * index + 8]:
                count = 0 if here == 0 else count
                expected.append(count)
                count += 1
            assert row["position_ids"].tolist() == expected
            assert row["labels"].tolist() == [
                -100 if p == 0 else token for token, p in zip(row["input_ids"].tolist(), expected)
            ]
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_mixed_data_sets_repeat_what_is_small():
    parts = [list(range(10)), list(range(100, 130))]
    assert len(MixedDataset(parts)) == 40
    mixed = list(MixedDataset(parts, [0.5, 0.5]))
    assert len(mixed) == 60
    assert sum(item < 100 for item in mixed) == 30
    assert set(mixed) == set(parts[0]) | set(parts[1])


# Attention within documents


def _models(tiny_config):
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    hmoe = tiny_config(num_hidden_layers=2, use_cache=False)
    window = tiny_config(num_hidden_layers=2, use_cache=False, sliding_window=4)
    return {
        "hmoe": HMoEForCausalLM(hmoe),
        "window": HMoEForCausalLM(window),
        "llama": LlamaForCausalLM(llama),
    }


@pytest.mark.parametrize("flatten", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["hmoe", "window", "llama"])
def test_packed_documents_equal_documents_run_alone(tiny_config, name, attention, flatten):
    model = _models(tiny_config)[name].double().eval()
    model.set_attn_implementation(attention)
    tolerance = 1e-9 if attention == "sdpa" else 1e-6  # eager attention takes its softmax in fp32
    lengths = [[5, 9, 2], [1, 12, 3]]
    rows = [torch.randint(0, 64, (sum(row),)) for row in lengths]
    sequences = [make_sequence(ids.numpy(), np.cumsum([0, *row[:-1]])) for ids, row in zip(rows, lengths)]
    batch = flatten_batch(sequences) if flatten else {k: torch.stack([s[k] for s in sequences]) for k in sequences[0]}
    with torch.no_grad():
        output = model(**batch)
        packed = output.logits.reshape(2, 16, -1)
        losses, labels = 0.0, 0
        for ids, row, logits in zip(rows, lengths, packed):
            for document, found in zip(ids.split(row), logits.split(row)):
                alone = model(input_ids=document[None])
                torch.testing.assert_close(found, alone.logits[0], rtol=0, atol=tolerance)
                if len(document) > 1:
                    target = document[1:]
                    losses += torch.nn.functional.cross_entropy(alone.logits[0, :-1], target, reduction="sum")
                    labels += len(target)
    # The loss is taken in fp32: a softmax over 64 tokens and a mean over the labels.
    assert output.loss.item() == pytest.approx((losses / labels).item(), rel=rounding(torch.float32, 64, labels))


@pytest.mark.parametrize("within", [False, True])
def test_streamed_sequences_are_slices_of_the_whole(within):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 99, size).tolist() for size in rng.integers(1, 40, 30)]
    rows = datasets.Dataset.from_dict({"input_ids": documents}).to_iterable_dataset()
    stream = PackedStream([rows], [1.0], 8, within=within)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    packed = PackedDataset(datasets.Dataset.from_dict({"input_ids": documents}, features=features), 8, within=within)
    for streamed, mapped in zip(stream.first_pass(), packed, strict=True):
        assert streamed.keys() == mapped.keys()
        assert all(torch.equal(streamed[name], mapped[name]) for name in mapped)


def test_a_stream_of_several_sources_has_the_shares_of_their_weights():
    rows = [datasets.Dataset.from_dict({"input_ids": [[i] * 5] * 10}).to_iterable_dataset() for i in range(2)]
    stream = PackedStream(rows, [3, 1], 8)
    from_second = sum(int(sequence["input_ids"][0]) for sequence in islice(stream, 2000))
    assert from_second / 2000 == pytest.approx(0.25, abs=0.03)


def test_a_stream_without_documents_ends_with_an_error():
    rows = datasets.Dataset.from_dict({"input_ids": [[], []]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="holds no document"):
        next(iter(PackedStream([rows], [1.0], 8)))


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_workers_read_every_document_once_a_pass(workers):
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * 4 for i in range(24)]}).to_iterable_dataset(num_shards=2)
    stream = PackedStream([rows], [1.0], 4)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    seen = [int(sequence["input_ids"][0]) for sequence in islice(loader, 24)]
    assert sorted(seen) == list(range(24))
