//! What memory is asked that somebody else has laid out.

use crate::Error;
use crate::error::{at_least, at_most, multiple};

/// Bytes that kernels read at once.
const TOGETHER: usize = 16;

/// The elements from the first to the end of the last, where along each dimension (its name, how many, and the distance
/// from one to the next) rows of so many elements of some bytes lie, no two in one place.
pub(crate) fn strides<const N: usize>(
    mut dimensions: [(&'static str, usize, usize); N],
    row: usize,
    element: usize,
) -> Result<usize, Error> {
    let operator = "kv_pool";
    multiple(operator, "head_dim of strided memory", row, TOGETHER / element)?;
    dimensions.sort_by_key(|&(_, _, stride)| stride);
    let (mut reach, most) = (row, isize::MAX.unsigned_abs() / element);
    for (name, count, stride) in dimensions.into_iter().filter(|&(_, count, _)| count > 1) {
        multiple(operator, name, stride, TOGETHER / element)?;
        at_least(operator, name, stride, reach)?;
        at_most(operator, name, stride, (most - reach) / (count - 1))?;
        reach += stride * (count - 1);
    }
    Ok(reach)
}

/// Memory at an address, of which strides reach so many bytes.
pub(crate) fn memory(address: u64, bytes: usize, reach: usize) -> Result<(), Error> {
    let operator = "kv_pool";
    let place = usize::try_from(address).unwrap_or(usize::MAX);
    multiple(operator, "address of the memory", place, TOGETHER)?;
    at_most(operator, "bytes of the memory", bytes, usize::MAX - place)?;
    at_most(operator, "bytes that the strides reach", reach, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(result: Result<usize, Error>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn strides_reach_over_what_lies_below_them() {
        // Two blocks of K and V of three tokens, with gaps everywhere.
        let dimensions = [("page", 2, 400), ("value", 2, 160), ("token", 3, 48)];
        assert_eq!(strides(dimensions, 32, 2), Ok(400 + 160 + 2 * 48 + 32));
        // A dimension of one element says nothing.
        assert_eq!(strides([("page", 1, 7), ("token", 3, 48)], 32, 2), Ok(128));
    }

    #[test]
    fn what_lies_in_one_place_or_out_of_line_is_refused_by_name() {
        let of = |value, token| strides([("page", 2, 400), ("value", 2, value), ("token", 3, token)], 32, 2);
        assert_eq!(said(of(120, 48)), "kv_pool: value is 120, the least allowed is 128");
        assert_eq!(said(of(160, 160)), "kv_pool: token is 160, the least allowed is 192");
        assert_eq!(said(of(160, 24)), "kv_pool: token is 24, the least allowed is 32");
        assert_eq!(said(of(160, 44)), "kv_pool: token is 44, which is not a positive multiple of 8");
        assert_eq!(said(of(0, 48)), "kv_pool: value is 0, which is not a positive multiple of 8");
        let odd = strides([("token", 3, 48)], 24, 1);
        assert_eq!(
            said(odd),
            "kv_pool: head_dim of strided memory is 24, which is not a positive multiple of 16"
        );
    }

    #[test]
    fn what_64_bits_do_not_address_is_refused() {
        let stride = 1 << 61;
        assert_eq!(strides([("page", 2, stride)], 16, 2), Ok(stride + 16));
        assert!(
            said(strides([("page", 3, stride)], 16, 2))
                .starts_with(&format!("kv_pool: page is {stride}, the most"))
        );
        assert!(strides([("page", usize::MAX, usize::MAX - 15)], 16, 1).is_err());
    }

    #[test]
    fn memory_holds_what_the_strides_reach() {
        assert_eq!(memory(4096, 1000, 1000), Ok(()));
        let said = |result: Result<(), Error>| result.unwrap_err().to_string();
        let beyond = "kv_pool: bytes that the strides reach is 1001, the most allowed is 1000";
        assert_eq!(said(memory(4096, 1000, 1001)), beyond);
        let crooked = "kv_pool: address of the memory is 4104, which is not a positive multiple of 16";
        assert_eq!(said(memory(4104, 1000, 8)), crooked);
        assert!(memory(0, 1000, 8).is_err() && memory(u64::MAX - 15, 1000, 8).is_err());
    }
}
