"""Primitives that take a weight as a whole, by the reason why; the weight is merged for them.

Every primitive of JAX 0.7 to 0.12 is here or has a rule, and a test finds the ones that a new version brings. Sums over
axes and writes into a part are linear too, but the merged weight costs no more there.
"""

UNKNOWN = "no rule follows a weight into it; jlora.transform.register adds one"

_NONLINEAR = """
abs acos acosh approx_top_k argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil check clamp cos
cosh cumlogsumexp cummax cummin cumprod digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min ne nextafter
one_minus_square polygamma polynomial pow random_gamma reduce_max reduce_min reduce_prod regularized_incomplete_beta rem
rng_uniform round rsqrt select_and_gather_add select_and_scatter select_and_scatter_add sign sin sinh sort sqrt square
tan tanh top_k zeta
"""
_MATRIX = """
cholesky cholesky_update eig eigh eigh_jacobi geqp3 geqrf hessenberg householder_product lu ormqr qr schur svd
symmetric_product triangular_solve tridiagonal tridiagonal_solve
"""
_SUMS = "cumsum reduce reduce_sum reduce_window reduce_window_max reduce_window_min reduce_window_sum"
_WRITES = "dynamic_update_slice scatter scatter-max scatter-min scatter-mul"
_COMPLEX = "complex conj fft imag real"
_DEVICES = """
all_gather_invariant all_gather_reduced pbroadcast pbroadcast_dynamic pgather pmax pmin precv preduced psend
psum psum_invariant ragged_all_to_all reduce_scatter reduced_vary_cast reduced_vary_cast_p relayout unreduced_pmax
unreduced_pmin unreduced_psum unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p xla_pmap
"""
_OPAQUE = """
bias_bwd bias_fwd call call_hi_primitive call_hi_primitive_linearized closed_call composite custom_lin
custom_linear_solve custom_transpose_call custom_vmap_call debug_callback debug_print
dot_product_attention_bwd_wrapper dot_product_attention_fp8_bwd_wrapper dot_product_attention_fp8_fwd_wrapper
dot_product_attention_fwd_wrapper eval_jaxpr ffi_call inspect_sharding io_callback linear_call pure_callback remat_opt
run_state scaled_dot scaled_matmul scaled_matmul_wrapper stage
"""
_REFERENCES = """
accum_grad_in_ref addupdate box_get box_set dce_sink empty_ref free_ref freeze get log_extend log_read mutable_array
new_box new_log new_ref swap tie
"""
_PLACED = "bitcast_convert_type layout_constraint with_memory_space_constraint"
_NO_FLOATS = """
after_all and axis_index clz create_token empty empty2 from_edtype iota lu_pivots_to_permutation mulhi not or
philox2x32 philox4x32 population_count random_bits random_clone random_fold_in random_seed random_split random_unwrap
random_wrap reduce_and reduce_or reduce_xor rng_bit_generator shift_left shift_right_arithmetic shift_right_logical
threefry2x32 threefry4x32 to_edtype xor zeros_like
"""

_BY_REASON = {
    "it is not linear in the weight": _NONLINEAR,
    "it is linear algebra of the whole matrix": _MATRIX,
    "it sums over axes of the weight": _SUMS,
    "it writes into a part of the weight": _WRITES,
    "its numbers are complex": _COMPLEX,
    "it sums or sends the weight between devices": _DEVICES,
    "nothing is known of what it computes": _OPAQUE,
    "it keeps the weight in a reference": _REFERENCES,
    "it asks for the bits or the place of the weight": _PLACED,
    "it takes no floating-point numbers": _NO_FLOATS,
}

WHOLE = {name: reason for reason, names in _BY_REASON.items() for name in names.split()}
