"""Tests of the capture folders that do not run a second time on the device that is not there, and why."""

from __future__ import annotations

_COMPILER = "torch.compile and torch.export have no back end for the device"
_KERNELS = "the kernels are torch's for the CPU, or stand-ins for others' that run there"
_CONSTANTS = "its constants are made in host memory when it is imported"
_DEPTH = "it counts function modes, of which the default device is one"
_NUMPY = "it reads its tensors by numpy"
_TYPES = "it is about types of tensors, and the device's are of a type of their own"
_MEMORY = "which tensors share memory decides it, and the device's do not say"
_LATER = "on a device no output is looked at, so that one form more is judged until its numbers have come"
_NUMBERS = "it is arithmetic of a few numbers, whatever their device"
_GENERATORS = "a device in Python has no generator that tells whether it was used"
_SPEED = "it runs too many operations for a device in Python"

STAND_INS = ("attention/test_kernels.py",)
"""Tests of kernels that only a stand-in on the CPU, or on the device in Python, is there for."""

RUNS_ON_A_REAL_ONE = frozenset({_COMPILER, _GENERATORS, _MEMORY, _SPEED})

REASONS = {
    "tests/capture/test_provenance.py": "on a device a sign of NaN comes with the step's other values, a step later",
    "compile": _COMPILER,
    "test_export_is_not_entered": _DEPTH,
    "test_operations_of_a_compiled_graph": _COMPILER,
    "test_what_a_compiled_graph_records": _COMPILER,
    "test_flex.py": _KERNELS,
    "test_wrappers_do_not_show_in_names": _KERNELS,
    "test_an_exception_in_a_fused_module": _KERNELS,
    "test_without_gradients[fgpu-inference_mode]": _KERNELS,
    "added_mask-mask": _CONSTANTS,
    "masked_in_place-mask": _CONSTANTS,
    "where_and_clamp-mask": _CONSTANTS,
    "test_padded_queries_are_left_out[fgpu-": _CONSTANTS,
    "test_sink_logits_take_probability": _CONSTANTS,
    "test_a_mode_that_the_forward_pass_leaves": _DEPTH,
    "test_an_exception_in_the_forward_pass_leaves_nothing": _DEPTH,
    "test_an_interrupted_pass": _DEPTH,
    "test_default_devices_inside": _DEPTH,
    "test_leaving_twice": _DEPTH,
    "test_an_error_in_the_statistic_ends": _DEPTH,
    "test_dispatch_modes_see_nothing": _DEPTH,
    "test_members_that_draw_elsewhere_are_said": _GENERATORS,
    "test_actions_sampled_from_a_distribution": _GENERATORS,
    "test_validation_loops.py::test_full_batches_of_several_loaders": _GENERATORS,
    "test_phases.py": _NUMPY,
    "test_trust.py": _NUMBERS,
    "test_unusual_inputs.py": _TYPES,
    "test_a_callable_that_has_no_hash": _TYPES,
    "normalised_router": _TYPES,
    "test_compat.py": "private names are gone on every device alike",
    "test_slices_bring_no_distance": _CONSTANTS,
    "test_other_sources_stay_apart": _CONSTANTS,
    "test_a_target_is_right_or_none_is_given": _SPEED,
    "test_looks_are_few_where_the_loss_is_a_function": _SPEED,
    "test_a_later_look_finds_what_was_made_in_between": _SPEED,
    "test_one_made_after_the_first_validation_is_found_in_a_later_one": _SPEED,
    **dict.fromkeys(("judged_each[fgpu-3]", "judged_each[fgpu-7]"), _SPEED),  # two passes do
    **dict.fromkeys(
        (
            f"are_one_prediction[fgpu-{of}-{passes}]"
            for of in (
                "logits",
                "gathered",
                "logsumexp",
                *(f"probabilities{by}" for by in ("", ", by a loss module", ", by another one")),
            )
            for passes in (2, 7)  # three do
        ),
        _SPEED,
    ),
    **dict.fromkeys(
        (f"name_no_target[fgpu-{of}]" for of in ("soft targets", "focal", "sum of logits", "weights of passes")), _SPEED
    ),
    **dict.fromkeys(  # the others of these tables do
        (
            f"test_hardly_a_row_of_another_loss_passes[fgpu-{of}]"
            for of in ("energy", "squared error", "margin", "sum", "absolute error", "several labels")
        ),
        _SPEED,
    ),
    **dict.fromkeys(
        (
            f"test_each_head_is_judged_under_its_own_name[fgpu-{of}"
            for of in ("second1", "<lambda>", "cross_entropy-list", "cross_entropy-dict")
        ),
        _SPEED,
    ),
    **dict.fromkeys(
        (
            f"test_of_a_head_with_a_loss_of_another_kind_nothing_is_claimed[fgpu-{of}]"
            for of in ("dict", "list", "logits")
        ),
        _SPEED,
    ),
    **dict.fromkeys((f"fgpu-{of}-7]" for of in ("probabilities", "logsumexp", "gathered", "logits")), _SPEED),
    **dict.fromkeys(
        (
            f"attention/test_{of}.py"
            for of in (
                "caches",
                "found",
                "heads",
                "masks",
                "unknown_places",
                "padding",
                "padding_lost",
                "parts",
                "positions",
                "used_weights",
            )
        ),
        _CONSTANTS,
    ),
    "predictions/test_corpus": _CONSTANTS,
    "test_only_rows_without_a_key_are_left_out": _CONSTANTS,
    "test_labels.py::test_what_a_label_says_is_there": _NUMPY,
    "test_labels.py::test_a_reshape_that_copies": _NUMPY,
    "test_padded_queries_of_self_attention_are_left_out": _MEMORY,
    "test_values_of_their_own_make_no_cross_attention": _MEMORY,
    "test_an_encoder_with_padding_and_a_causal_mask": _MEMORY,
    "test_self_and_cross_attention_of_one": _MEMORY,
    "test_attention_is_found_and_exact[fgpu-keys_first": _MEMORY,
    "test_attention_is_found_and_exact[fgpu-in_parts": _MEMORY,
    "test_never_in_the_way.py::test_nothing_is_read_back_from_the_device": _MEMORY,
    "test_written_otherwise.py": _MEMORY,
    "test_tables.py": _MEMORY,
    "test_fewer_keys.py": _MEMORY,
    "test_settled.py": _LATER,
}


def reason(node: str) -> str | None:
    """Why a test does not run there; None where it does."""
    return next((why for part, why in REASONS.items() if part in node), None)
