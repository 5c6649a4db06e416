import pytest

from experiments.compiled.costs import Cost, Program, arrays, totals

# The loop runs three times and updates a line of an array in place.
TEXT = """HloModule m, is_scheduled=true

%product (p.0: bf16[64,32], p.1: bf16[32,16]) -> bf16[64,16] {
  %p.0 = bf16[64,32]{1,0} parameter(0)
  %p.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%update (p.2: f32[8,100], p.3: bf16[8,2,100], p.4: s32[]) -> f32[8,100] {
  %p.2 = f32[8,100]{1,0} parameter(0)
  %p.3 = bf16[8,2,100]{2,1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[8,2,100]{2,1,0} convert(%p.3)
  %line = f32[1,2,100]{2,1,0} dynamic-slice(%wide, %p.4, %zero, %zero), dynamic_slice_sizes={1,2,100}
  %half = f32[1,1,100]{2,1,0} slice(%line), slice={[0:1], [1:2], [0:100]}
  %flat = f32[1,100]{1,0} bitcast(%half)
  %exp = f32[1,100]{1,0} exponential(%flat)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%p.2, %exp, %p.4, %zero)
}

%body (s: (s32[], f32[8,100], bf16[8,2,100])) -> (s32[], f32[8,100], bf16[8,2,100]) {
  %s = (s32[], f32[8,100]{1,0}, bf16[8,2,100]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[8,100]{1,0} get-tuple-element(%s), index=1
  %b = bf16[8,2,100]{2,1,0} get-tuple-element(%s), index=2
  %fused = f32[8,100]{1,0} fusion(%a, %b, /*index=2*/%i), kind=kLoop, calls=%update, metadata={op_name="put"}
  %begun = ((f32[8,100]{1,0}, bf16[8,2,100]{2,1,0}, s32[]), f32[8,100]{1,0}, u32[]) fusion-start(%fused, %b, %i), kind=kLoop, calls=%update
  %ended = f32[8,100]{1,0} fusion-done(%begun)
  ROOT %t = (s32[], f32[8,100]{1,0}, bf16[8,2,100]{2,1,0}) tuple(%i, %ended, %b)
}

%sliced (p.5: f32[3,2,5], p.6: bf16[7,2,5], p.7: s32[]) -> bf16[7,2,5] {
  %p.5 = f32[3,2,5]{2,1,0} parameter(0)
  %p.6 = bf16[7,2,5]{2,1,0} parameter(1)
  %p.7 = s32[] parameter(2)
  %none = s32[] constant(0)
  %layer = f32[1,2,5]{2,1,0} dynamic-slice(%p.5, %p.7, %none, %none), dynamic_slice_sizes={1,2,5}
  %of_layer = bf16[1,2,5]{2,1,0} custom-call(%layer), custom_call_target="mosaic_gpu_v2"
  ROOT %stacked = bf16[7,2,5]{2,1,0} dynamic-update-slice(%p.6, %of_layer, %p.7, %none, %none)
}

ENTRY %main (x: bf16[64,32], y: bf16[32,16], z: bf16[4,9,9,6], k: bf16[6,3,3,1]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %z = bf16[4,9,9,6]{3,2,1,0} parameter(2)
  %k = bf16[6,3,3,1]{3,2,1,0} parameter(3)
  %gemm = bf16[64,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%product, metadata={op_name="a/dot"}
  %moved = bf16[64,16]{0,1} copy(%gemm)
  %conv = (bf16[4,9,9,6]{3,2,1,0}, u8[0]{0}) custom-call(%z, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=6, custom_call_target="__cudnn$convForward"
  %place = f32[2,5]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %mine = (f32[2,5]{1,0}) custom-call(%x, %place), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{0}: (1, {})}
  %stack = bf16[7,2,5]{2,1,0} fusion(%z, %y, %x), kind=kCustom, calls=%sliced
  %start = (s32[], f32[8,100]{1,0}, bf16[8,2,100]{2,1,0}) tuple()
  %loop = (s32[], f32[8,100]{1,0}, bf16[8,2,100]{2,1,0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[64,16]{1,0} bitcast(%moved)
}
"""  # noqa: E501


def test_costs_of_each_kind():
    costs = {cost.name: cost for cost in Program(TEXT).costs()}
    assert list(costs) == ["gemm", "moved", "conv", "mine", "of_layer", "fused", "begun"]
    gemm, moved, conv, mine, of_layer, fused, begun = costs.values()
    assert (gemm.kind, gemm.bytes, gemm.flops) == (
        "matrix product",
        2 * (64 * 32 + 32 * 16 + 64 * 16),
        2 * 64 * 32 * 16,
    )
    assert gemm.launches == 1
    assert (moved.kind, moved.bytes) == ("copy", 4 * 64 * 16)
    assert (conv.kind, conv.flops) == ("depthwise convolution", 2 * 9 * 4 * 9 * 9 * 6)
    # Written into the place of an operand: counted once.
    assert (mine.kind, mine.bytes) == ("mosaic_gpu_v2", 2 * 64 * 32 + 4 * 2 * 5)
    # A kernel in a fusion that hands it a layer of one stack and has its result written into another.
    assert (of_layer.kind, of_layer.bytes) == ("mosaic_gpu_v2", 10 * 4 + 10 * 2)
    # Half of a line read, the index read, a line written; three times.
    assert (fused.bytes, fused.launches) == (100 * 2 + 4 + 100 * 4, 3)
    assert (begun.kind, begun.bytes, begun.launches) == ("fusion", fused.bytes, 3)


def test_arrays_of_a_shape():
    found = arrays("(f32[2,3]{1,0}, /*index=1*/pred[], bf16[0]{0}, s4[3]{0}, f8e4m3fn[5]{0})")
    assert [array.bytes for array in found] == [24, 1, 0, 2, 5]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        Program("module {}")


def test_totals_and_the_least_time():
    product = Cost("p", "matrix product", 1, int(4.3e9), int(7e11))
    assert product.least_seconds == pytest.approx(1e-3)
    assert Cost("p", "depthwise convolution", 1, int(4.3e9), int(7e11)).least_seconds == pytest.approx(7e11 / 60e12)
    costs, found = list(Program(TEXT).costs()), totals(TEXT)
    assert found["launches"] == 5 + 2 * 3 and found["flops"] == sum(cost.flops * cost.launches for cost in costs)
    assert found["bytes"] == sum(cost.bytes * cost.launches for cost in costs)
    assert found["least_ms"] == pytest.approx(1e3 * sum(c.least_seconds * c.launches for c in costs), rel=1e-3)
