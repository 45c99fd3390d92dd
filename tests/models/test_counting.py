"""Parameter counts against sums by hand, memory estimates, and the print-out."""

import re

import pytest
import torch

from million_experts.models import PeerConfig, PeerForCausalLM, count_parameters, memory_estimate
from million_experts.models.counting import ParameterCount

EMBEDDINGS = 50 * 16
ATTENTION = 4 * 16 * 16
NORMS = 2 * 16
DENSE = 2 * 16 * 32
TABLE = 64 * 2 * 16
RETRIEVAL = 16 * 2 * 8 + 2 * 8 * 4 + 2 * 16  # query projection, two codebooks, query norm over heads
REST = EMBEDDINGS + 2 * (ATTENTION + NORMS) + DENSE + RETRIEVAL + 16


def test_counts_equal_the_sum_by_hand(tiny_config):
    count = count_parameters(tiny_config(peer={"query_norm": "batch"}))
    assert count.tables == TABLE
    assert count.total == TABLE + REST
    assert count.active == 2 * 4 * 2 * 16 + REST  # 2 heads of 4 experts, two rows each
    assert count.embeddings == EMBEDDINGS


def test_a_model_counts_like_its_configuration(tiny_config):
    config = tiny_config(peer={"glu": True}, mlp_layer_types="peer", tie_word_embeddings=False)
    model = PeerForCausalLM(config)
    assert count_parameters(model) == count_parameters(config)
    assert count_parameters(model).total == model.num_parameters()
    assert count_parameters(model).tables == 2 * 64 * 3 * 16
    assert count_parameters(model).embeddings == 2 * EMBEDDINGS
    assert memory_estimate(model).inference == model.get_memory_footprint()
    assert memory_estimate(model) == memory_estimate(config)


def test_counting_leaves_the_configuration_as_it_was(tiny_config):
    config = tiny_config()
    count_parameters(config)
    assert config == tiny_config()


def test_a_large_configuration_is_counted_without_being_built():
    config = PeerConfig(
        hidden_size=4096, num_attention_heads=32, num_hidden_layers=32, mlp_layer_types="peer"
    )
    count = count_parameters(config)
    assert count.tables == 32 * 1024**2 * 2 * 4096
    assert count.total > 270e9  # a terabyte, if it were


@pytest.mark.parametrize(
    ("total", "active", "label"),
    [
        (540_300_000, 12_040_000, "540M-A12M"),
        (1_073_741_824, 5_240_000, "1.07B-A5.24M"),
        (999_900, 999_400, "1M-A999K"),
        (999, 12, "999-A12"),
        (2_500_000_000_000, 10**9, "2.5T-A1B"),
    ],
)
def test_labels_are_short(total, active, label):
    assert ParameterCount(total, active, 0, 0).label == label


def test_memory_is_split_into_tables_and_the_rest(tiny_config):
    config = tiny_config(peer={"query_norm": "none"})
    memory = memory_estimate(config)
    assert memory.table_weights == memory.table_gradients == 4 * TABLE
    assert memory.table_optimizer == 8 * TABLE
    assert memory.other_gradients == 4 * (REST - 2 * 16)
    assert memory.training == memory.inference + memory.training_adds
    assert memory.training_adds == 3 * memory.other_gradients + 3 * memory.table_gradients
    half = memory_estimate(config, dtype=torch.bfloat16)
    assert 2 * half.table_weights == memory.table_weights
    assert 2 * half.training_adds == memory.training_adds


def test_frozen_parameters_need_no_gradients(tiny_model):
    model = tiny_model()
    model.model.layers[1].mlp.experts.requires_grad_(False)
    memory = memory_estimate(model)
    assert (memory.table_weights, memory.table_gradients, memory.table_optimizer) == (4 * TABLE, 0, 0)


def test_the_print_out_begins_with_one_line_of_figures(tiny_config):
    with torch.device("meta"):
        model = PeerForCausalLM(
            tiny_config(hidden_size=256, peer={"num_experts": 65536, "query_norm": "none"})
        )
    lines = repr(model).splitlines()
    assert lines[0].startswith("PeerForCausalLM 34.1M-A565K: ")
    assert "tables 134 MB, other weights " in lines[0]
    assert re.search(r"; training adds gradients 13\d MB, AdamW state 27\d MB$", lines[0])
    assert lines[1] == "PeerForCausalLM("
    assert sum("AdamW" in line for line in lines) == 1
