"""The Triton kernels. Logits are kept in units of log 2, so that exponentials are exp2.

A row tile visits the key tiles that `segment_kernels.tile_bounds` lists for it, those where some pair of tokens must
be masked apart from those where none must: hence the three parts of each loop. Statistics are float32
whatever the inputs are; products are taken in the type DOT, the inputs' own on a GPU.

Tokens are counted along one sequence of keys and rows. As a rule the rows are the keys, and first_row is 0. In a visit
(VISIT, see `triton_visit`) the keys are the tokens [0, keys_end) and the rows [first_row, seq_len), with nothing in
between, first_row a multiple of the tiles' sizes: nothing else tells a block beside the diagonal from a whole triangle.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for -inf, but its differences are no NaN. What masked keys add to a row before its first visible one
# is lost in the product with exp2(_MASKED - m) = 0; every row but those of padding has a visible key.
_MASKED = tl.constexpr(-1e30)
# Not compiled anew for every length; strides are, for the width of the loads depends on them.
_VARYING = ["heads", "group", "seq_len", "first_row", "keys_end"]
_LN2 = tl.constexpr(0.6931471805599453)
# fp16 loses weights below 6e-8; they are 2 at most, and its largest number is 65504.
_BOOST = tl.constexpr(2.0**14)


@triton.jit
def _load_tokens(base, tokens, live, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """[tokens, BLOCK_D]; 0 where not live, so that padding may hold anything, and beyond HEAD_DIM."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + tokens.to(tl.int64)[:, None] * strides[2] + channels[None, :] * strides[3]
    mask = live[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT)


@triton.jit
def _names(segments, tokens, seq_len, SEGMENTS: tl.constexpr):
    """What segment each token is in: negative for padding and beyond the sequence."""
    if SEGMENTS:
        return tl.load(segments + tokens, mask=tokens < seq_len, other=-1)
    else:
        return tl.where(tokens < seq_len, 0, -1)


@triton.jit
def _bounds(bounds, index, start, seq_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr):
    """(lo, lo_full, end, hi_full, hi) of `segment_kernels.tile_bounds`; end = start for a tile of padding."""
    end = tl.minimum(start + BLOCK_M, seq_len)
    if SEGMENTS:
        lo = tl.load(bounds + index * 5)
        lo_full = tl.load(bounds + index * 5 + 1)
        hi_full = tl.load(bounds + index * 5 + 2)
        hi = tl.load(bounds + index * 5 + 3)
        end = tl.minimum(end, hi)
        return lo, lo_full, end, hi_full, hi
    else:
        return 0, 0, end, end + (seq_len - end) // BLOCK_N * BLOCK_N, seq_len


@triton.jit
def relative_sum(total, excess):
    """What the Hopper backward kernel is given of a row, from the sum of its exponentials relative to a pivot.

    `excess` is the pivot less the row's logit with its own key, which backward finds in the tile on the diagonal: the
    result is the sum relative to that, or, where it is large, minus the logarithm of that sum. A log-sum-exp
    would be rounded by its own size, and a probability next to 1 with it.
    """
    relative = total * tl.exp2(excess)
    return tl.where(relative <= 2.0**80, relative, -(tl.log2(total) + excess))


@triton.jit
def _forward_tile(
    sequence, tile,
    q_s, k_s, q_t, k_t, q_s_strides, k_s_strides, q_t_strides, k_t_strides, segments, bounds, kl,
    max_s, max_t, sum_s, sum_t, heads, group, seq_len, first_row, keys_end, log2_scale,
    AGAIN: tl.constexpr, VISIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row tile of one head, in one pass over its keys.

    Running sums, with Z = S - m and m the running maximum: l = sum e^Z of student and of teacher, and
    a = sum e^Z_t (Z_t - Z_s);  KL = a / l_t - log l_t + log l_s. The maxima themselves, which may be large
    where the divergence is tiny, never enter a sum. A visit goes on where the last one of these rows ended.
    """
    tiles = tl.cdiv(seq_len, BLOCK_M)
    batch, head = sequence // heads, sequence % heads
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    segments += batch * seq_len
    row_names = _names(segments, rows, seq_len, SEGMENTS)
    live = row_names >= 0
    lo, lo_full, end, _, _ = _bounds(bounds, batch * tiles + tile, start, seq_len, BLOCK_M, BLOCK_N, SEGMENTS)
    start = tl.minimum(start, keys_end // BLOCK_N * BLOCK_N)
    end = tl.minimum(end, keys_end)
    lo_full = tl.minimum(lo_full, start)

    q_s += batch * q_s_strides[0] + head * q_s_strides[1]
    q_t += batch * q_t_strides[0] + head * q_t_strides[1]
    k_s += batch * k_s_strides[0] + head // group * k_s_strides[1]
    k_t += batch * k_t_strides[0] + head // group * k_t_strides[1]
    x_s = _load_tokens(q_s, rows - first_row, live, q_s_strides, HEAD_DIM, BLOCK_D, DOT)
    x_t = _load_tokens(q_t, rows - first_row, live, q_t_strides, HEAD_DIM, BLOCK_D, DOT)

    place = sequence * (seq_len - first_row) + rows - first_row
    inside = rows < seq_len
    if VISIT:
        m_s = tl.load(max_s + place, mask=inside, other=0.0)
        m_t = tl.load(max_t + place, mask=inside, other=0.0)
        l_s = tl.load(sum_s + place, mask=inside, other=0.0)
        l_t = tl.load(sum_t + place, mask=inside, other=0.0)
        a = tl.load(kl + place, mask=inside, other=0.0)
    else:
        m_s = tl.full([BLOCK_M], _MASKED, tl.float32)
        m_t = tl.full([BLOCK_M], _MASKED, tl.float32)
        l_s = tl.zeros([BLOCK_M], tl.float32)
        l_t = tl.zeros([BLOCK_M], tl.float32)
        a = tl.zeros([BLOCK_M], tl.float32)
    own_s = tl.zeros([BLOCK_M], tl.float32)
    own_t = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0 if SEGMENTS else 1, 3):
        if part == 0:
            first, last = lo, lo_full
        elif part == 1:
            first, last = lo_full, start
        else:
            first, last = start, end
        for key_start in range(first, last, BLOCK_N):
            keys = key_start + tl.arange(0, BLOCK_N)
            key_names = tl.zeros([BLOCK_N], tl.int32) if part == 1 else _names(segments, keys, keys_end, SEGMENTS)
            y_s = _load_tokens(k_s, keys, key_names >= 0, k_s_strides, HEAD_DIM, BLOCK_D, DOT)
            y_t = _load_tokens(k_t, keys, key_names >= 0, k_t_strides, HEAD_DIM, BLOCK_D, DOT)
            s = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION) * log2_scale
            t = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION) * log2_scale
            if part != 1:
                visible = (keys[None, :] <= rows[:, None]) & (key_names[None, :] == row_names[:, None])
                s = tl.where(visible, s, _MASKED)
                t = tl.where(visible, t, _MASKED)
            if AGAIN and not VISIT and part == 2:
                own = keys[None, :] == rows[:, None]
                own_s += tl.sum(tl.where(own, s, 0.0), 1)
                own_t += tl.sum(tl.where(own, t, 0.0), 1)
            new_m_s = tl.maximum(m_s, tl.max(s, 1))
            new_m_t = tl.maximum(m_t, tl.max(t, 1))
            fall_s = m_s - new_m_s
            fall_t = m_t - new_m_t
            m_s = new_m_s
            m_t = new_m_t
            s -= m_s[:, None]
            t -= m_t[:, None]
            p_t = tl.exp2(t)
            shrink_t = tl.exp2(fall_t)
            a = (a + l_t * (fall_t - fall_s)) * shrink_t + tl.sum(p_t * (t - s), 1)
            l_s = l_s * tl.exp2(fall_s) + tl.sum(tl.exp2(s), 1)
            l_t = l_t * shrink_t + tl.sum(p_t, 1)

    if VISIT:
        tl.store(kl + place, a, mask=inside)
        tl.store(max_s + place, m_s, mask=inside)
        tl.store(max_t + place, m_t, mask=inside)
        tl.store(sum_s + place, l_s, mask=inside)
        tl.store(sum_t + place, l_t, mask=inside)
    else:
        value = (a / l_t - (tl.log2(l_t) - tl.log2(l_s))) * _LN2
        tl.store(kl + place, tl.where(live, value, 0.0), mask=inside)
        if AGAIN:
            tl.store(sum_s + place, tl.where(live, relative_sum(l_s, m_s - own_s), 1.0), mask=inside)
            tl.store(sum_t + place, tl.where(live, relative_sum(l_t, m_t - own_t), 1.0), mask=inside)
        else:
            # Kept apart, not as m + log l: that would round a probability next to 1 by the size of its logit.
            tl.store(max_s + place, tl.where(live, m_s, 0.0), mask=inside)
            tl.store(max_t + place, tl.where(live, m_t, 0.0), mask=inside)
            tl.store(sum_s + place, tl.where(live, 1.0 / l_s, 0.0), mask=inside)
            tl.store(sum_t + place, tl.where(live, 1.0 / l_t, 0.0), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q_s, k_s, q_t, k_t, q_s_strides, k_s_strides, q_t_strides, k_t_strides, segments, bounds, kl,
    max_s, max_t, sum_s, sum_t, heads, group, seq_len, first_row, keys_end, log2_scale, VISIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a row tile. Rows of the divergence [B, H, T], maxima of the logits and 1 / sums of the exponentials.

    In a visit the rows' `torch_visit.State` goes in and out: a in the rows' place, the maxima, and the sums themselves.
    """
    tiles = tl.cdiv(seq_len, BLOCK_M)
    own_tiles = tiles - first_row // BLOCK_M
    # The last row tiles have the most keys: they go first, so that none is left running alone at the end.
    _forward_tile(
        (tl.program_id(0) // own_tiles).to(tl.int64), tiles - 1 - tl.program_id(0) % own_tiles,
        q_s, k_s, q_t, k_t, q_s_strides, k_s_strides, q_t_strides, k_t_strides, segments, bounds, kl,
        max_s, max_t, sum_s, sum_t, heads, group, seq_len, first_row, keys_end, log2_scale, False, VISIT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, SEGMENTS, DOT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_VARYING, "count"])
def forward_again_kernel(
    q_s, k_s, q_t, k_t, q_s_strides, k_s_strides, q_t_strides, k_t_strides, segments, bounds, flags, kl,
    max_s, max_t, sum_s, sum_t, count, heads, group, seq_len, first_row, keys_end, log2_scale, VISIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of `count` row tiles with an entry other than 0 in flags [B, H, tiles], as a rule none; the tiles are an
    even number, of which the last one may lie behind the rows and has 0 then.

    What the others have in kl and the two sums (in a visit: and the two maxima) stays as the Hopper kernel left it. In
    a visit that is the state before it for rows of those tiles.
    """
    own_tiles = tl.cdiv(seq_len - first_row, 2 * BLOCK_M) * 2
    programs = tl.num_programs(0)
    for first in range(tl.program_id(0), count, programs * 32):
        # Of 32 tiles at once, for one after the other would wait for memory each time.
        numbers = first + programs * tl.arange(0, 32)
        if tl.max(tl.load(flags + numbers, mask=numbers < count, other=0)) != 0:
            for index in range(first, min(first + programs * 32, count), programs):
                if tl.load(flags + index) != 0:
                    _forward_tile(
                        (index // own_tiles).to(tl.int64), first_row // BLOCK_M + index % own_tiles,
                        q_s, k_s, q_t, k_t, q_s_strides, k_s_strides, q_t_strides, k_t_strides, segments, bounds, kl,
                        max_s, max_t, sum_s, sum_t, heads, group, seq_len, first_row, keys_end,
                        log2_scale, True, VISIT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, SEGMENTS, DOT, PRECISION,
                    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def backward_kernel(
    x_s, x_t, y_s, y_t, x_s_strides, x_t_strides, y_s_strides, y_t_strides, segments, bounds, max_s, max_t,
    inverse_s, inverse_t, row_grad, unit, grad, grad_strides,
    heads, group, seq_len, first_row, keys_end, log2_scale, softmax_scale,
    BELOW: tl.constexpr, ABOVE: tl.constexpr, NARROW: tl.constexpr, VISIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one head of x, whole: no other program writes to it.

    BELOW adds what the tile gets as rows, from its keys y:   sum_{j<=i} g_i (Ps_ij - Pt_ij) y_j.
    ABOVE adds what it gets as keys, from the rows y after it: sum_{j>=i} g_j (Ps_ji - Pt_ji) y_j.
    A self-relation has both, with y = x: S is symmetric, so the logits of row j with key i are those of i
    with j. For attention, x = q has BELOW alone; x = k has ABOVE alone, with `group` query heads to a key
    head.

    NARROW, for fp16 weights: row_grad comes divided by the power of two in unit.

    In a visit, which has one of the two, the result is added to grad, of float32, not multiplied by softmax_scale,
    and with NARROW too large by _BOOST.
    """
    tiles = tl.cdiv(seq_len, BLOCK_M)
    first_tile = 0
    own_end = seq_len
    if VISIT and ABOVE:
        own_end = keys_end
    if VISIT and BELOW:
        first_tile = first_row // BLOCK_M
    own_tiles = tl.cdiv(own_end, BLOCK_M) - first_tile
    # Programs with the most to visit go first: the last tiles below, the first above; both together are even.
    tile = first_tile + tl.program_id(0) % own_tiles
    if not ABOVE:
        tile = tiles - 1 - tl.program_id(0) % own_tiles
    sequence = (tl.program_id(0) // own_tiles).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    own = rows - first_tile * BLOCK_M
    segments += batch * seq_len
    row_names = _names(segments, rows, own_end, SEGMENTS)
    live = row_names >= 0
    lo, lo_full, end, hi_full, hi = _bounds(bounds, batch * tiles + tile, start, seq_len, BLOCK_M, BLOCK_N, SEGMENTS)

    x_s += batch * x_s_strides[0] + head * x_s_strides[1]
    x_t += batch * x_t_strides[0] + head * x_t_strides[1]
    own_s = _load_tokens(x_s, own, live, x_s_strides, HEAD_DIM, BLOCK_D, DOT)
    own_t = _load_tokens(x_t, own, live, x_t_strides, HEAD_DIM, BLOCK_D, DOT)
    y_s += batch * y_s_strides[0]
    y_t += batch * y_t_strides[0]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if BELOW:
        place = sequence * (seq_len - first_row) + rows - first_row
        full_end = tl.minimum(start, keys_end // BLOCK_N * BLOCK_N)
        keys_last = tl.minimum(end, keys_end)
        lo_full = tl.minimum(lo_full, full_end)
        m_s = tl.load(max_s + place, mask=live, other=0.0)
        m_t = tl.load(max_t + place, mask=live, other=0.0)
        r_s = tl.load(inverse_s + place, mask=live, other=0.0)
        r_t = tl.load(inverse_t + place, mask=live, other=0.0)
        if NARROW:
            r_s *= _BOOST
            r_t *= _BOOST
        k_s = y_s + head // group * y_s_strides[1]
        k_t = y_t + head // group * y_t_strides[1]
        for part in tl.static_range(0 if SEGMENTS else 1, 3):
            if part == 0:
                first, last = lo, lo_full
            elif part == 1:
                first, last = lo_full, full_end
            else:
                first, last = full_end, keys_last
            for key_start in range(first, last, BLOCK_N):
                keys = key_start + tl.arange(0, BLOCK_N)
                names = tl.zeros([BLOCK_N], tl.int32) if part == 1 else _names(segments, keys, keys_end, SEGMENTS)
                other_s = _load_tokens(k_s, keys, names >= 0, y_s_strides, HEAD_DIM, BLOCK_D, DOT)
                other_t = _load_tokens(k_t, keys, names >= 0, y_t_strides, HEAD_DIM, BLOCK_D, DOT)
                s = tl.dot(own_s, tl.trans(other_s), input_precision=PRECISION) * log2_scale
                t = tl.dot(own_t, tl.trans(other_t), input_precision=PRECISION) * log2_scale
                p_s = tl.exp2(s - m_s[:, None]) * r_s[:, None]
                p_t = tl.exp2(t - m_t[:, None]) * r_t[:, None]
                weight = p_s - p_t
                if part != 1:
                    visible = (keys[None, :] <= rows[:, None]) & (names[None, :] == row_names[:, None])
                    weight = tl.where(visible, weight, 0.0)
                acc = tl.dot(weight.to(DOT), other_s, acc, input_precision=PRECISION)
        # Here once a row, not above once a pair: a small g would be lost in a 16-bit weight.
        acc *= tl.load(row_grad + place, mask=live, other=0.0)[:, None]

    if ABOVE:
        for query_head in range(head * group, (head + 1) * group):
            q_s = y_s + query_head * y_s_strides[1]
            q_t = y_t + query_head * y_t_strides[1]
            statistics = (batch * heads * group + query_head) * (seq_len - first_row) - first_row
            for part in tl.static_range(3):
                if part == 0:
                    first, last = tl.maximum(start, first_row), end
                elif part == 1:
                    first, last = tl.maximum(end, first_row), hi_full
                else:
                    first, last = tl.maximum(hi_full, first_row), hi
                for query_start in range(first, last, BLOCK_N):
                    queries = query_start + tl.arange(0, BLOCK_N)
                    names = tl.zeros([BLOCK_N], tl.int32) if part == 1 else _names(segments, queries, seq_len, SEGMENTS)
                    other_s = _load_tokens(q_s, queries - first_row, names >= 0, y_s_strides, HEAD_DIM, BLOCK_D, DOT)
                    other_t = _load_tokens(q_t, queries - first_row, names >= 0, y_t_strides, HEAD_DIM, BLOCK_D, DOT)
                    others = statistics + queries
                    real = names >= 0
                    their_m_s = tl.load(max_s + others, mask=real, other=0.0)
                    their_m_t = tl.load(max_t + others, mask=real, other=0.0)
                    their_r_s = tl.load(inverse_s + others, mask=real, other=0.0)
                    their_r_t = tl.load(inverse_t + others, mask=real, other=0.0)
                    g = tl.load(row_grad + others, mask=real, other=0.0)
                    if NARROW:
                        g *= _BOOST
                    s = tl.dot(own_s, tl.trans(other_s), input_precision=PRECISION) * log2_scale
                    t = tl.dot(own_t, tl.trans(other_t), input_precision=PRECISION) * log2_scale
                    p_s = tl.exp2(s - their_m_s[None, :]) * their_r_s[None, :]
                    p_t = tl.exp2(t - their_m_t[None, :]) * their_r_t[None, :]
                    weight = (p_s - p_t) * g[None, :]
                    if part != 1:
                        visible = (queries[None, :] >= rows[:, None]) & (names[None, :] == row_names[:, None])
                        weight = tl.where(visible, weight, 0.0)
                    acc = tl.dot(weight.to(DOT), other_s, acc, input_precision=PRECISION)

    if not VISIT:
        if NARROW:
            acc *= tl.load(unit) * softmax_scale / _BOOST
        else:
            acc *= softmax_scale
    # A padding row can hold anything by now, NaN included: it is replaced, not multiplied.
    result = tl.where(live[:, None], acc, 0.0)
    channels = tl.arange(0, BLOCK_D)
    grad += batch * grad_strides[0] + head * grad_strides[1]
    pointers = grad + own.to(tl.int64)[:, None] * grad_strides[2] + channels[None, :] * grad_strides[3]
    mask = (rows < own_end)[:, None] & (channels < HEAD_DIM)[None, :]
    if VISIT:
        result += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, result.to(grad.dtype.element_ty), mask=mask)
