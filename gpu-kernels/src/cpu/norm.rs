//! RMSNorm.

/// Every `weight.len()` elements of `x` are one row.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    if weight.is_empty() {
        return;
    }
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        out.copy_from_slice(x);
        rms_norm_in_place(out, weight, eps);
    }
}

/// Every `weight.len()` elements of `x` are one row.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let sum: f32 = row.iter().map(|x| x * x).sum();
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let scale = 1.0 / (sum / row.len() as f32 + eps).sqrt();
        for (x, weight) in row.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}
