//! A matrix of 4-bit integers as its checkpoint stores it: checked, and read number by number.

use half::f16;

use crate::error::{below, multiple, same};
use crate::{Error, Int4Layout, Int4Source, WeightPart};

/// The integers of a checkpoint, all parts of the length that the shape asks for.
pub(crate) struct Stored<'a> {
    layout: Int4Layout,
    /// Words of each row of `values`, and of `zeros`.
    width: usize,
    zeros_width: usize,
    /// Outputs, and inputs of a group.
    rows: usize,
    group: usize,
    groups: usize,
    values: &'a [[u8; 4]],
    zeros: &'a [[u8; 4]],
    scales: &'a [[u8; 2]],
    group_of: Option<&'a [[u8; 4]]>,
}

impl<'a> Stored<'a> {
    /// Checks the parts, where groups are of a multiple of `step` inputs.
    pub(crate) fn new(source: &'a Int4Source, step: usize) -> Result<Self, Error> {
        let operator = "weight_int4";
        let &Int4Source { layout, rows, cols, group, .. } = source;
        multiple(operator, "outputs", rows, 8)?;
        multiple(operator, "inputs", cols, 8)?;
        if group != cols {
            multiple(operator, "elements of a group", group, step)?;
        }
        multiple(operator, "inputs", cols, group)?;
        let groups = cols / group;
        let part = |name, part: &'a WeightPart, bytes: Option<usize>| {
            let all = (*part.bytes).as_ref();
            let found = all.get(part.range.clone()).unwrap_or_default();
            same(operator, name, found.len(), bytes.unwrap_or(usize::MAX))?;
            Ok(found)
        };
        let values = part("bytes of the values", &source.values, rows.checked_mul(cols / 2))?;
        let zeros = part("bytes of the zero points", &source.zeros, (rows / 2).checked_mul(groups))?;
        let scales = part("bytes of the scales", &source.scales, (rows * 2).checked_mul(groups))?;
        let group_of = match &source.group_of {
            Some(found) => {
                Some(part("bytes of the groups of inputs", found, cols.checked_mul(4))?.as_chunks().0)
            }
            None => None,
        };
        let width = match layout {
            Int4Layout::Awq => rows / 8,
            Int4Layout::Gptq | Int4Layout::GptqV2 => rows,
        };
        let (values, zeros, scales) = (values.as_chunks().0, zeros.as_chunks().0, scales.as_chunks().0);
        Ok(Self {
            layout,
            width,
            zeros_width: rows / 8,
            rows,
            group,
            groups,
            values,
            zeros,
            scales,
            group_of,
        })
    }

    /// The first input that is in another group than its place says.
    pub(crate) fn first_out_of_order(&self) -> Option<usize> {
        let mut inputs = self.group_of?.iter().enumerate();
        inputs.find_map(|(input, &group)| (index(group) != input / self.group).then_some(input))
    }

    /// Inputs by their group, in their order within one; `None` if that is the order in which they come.
    pub(crate) fn order(&self) -> Result<Option<Vec<u32>>, Error> {
        let (Some(group_of), Some(_)) = (self.group_of, self.first_out_of_order()) else { return Ok(None) };
        let mut members = vec![Vec::with_capacity(self.group); self.groups];
        for (input, &group) in (0..).zip(group_of) {
            below("weight_int4", "group of an input", index(group), self.groups)?;
            members[index(group)].push(input);
        }
        for members in &members {
            same("weight_int4", "inputs of a group", members.len(), self.group)?;
        }
        Ok(Some(members.concat()))
    }

    pub(crate) fn value(&self, row: usize, col: usize) -> u8 {
        match self.layout {
            Int4Layout::Awq => nibble(self.values[col * self.width + row / 8], awq_place(row % 8)),
            Int4Layout::Gptq | Int4Layout::GptqV2 => nibble(self.values[col / 8 * self.width + row], col % 8),
        }
    }

    pub(crate) fn zero(&self, row: usize, group: usize) -> u8 {
        let word = self.zeros[group * self.zeros_width + row / 8];
        match self.layout {
            Int4Layout::Awq => nibble(word, awq_place(row % 8)),
            Int4Layout::Gptq => nibble(one_more(word), row % 8),
            Int4Layout::GptqV2 => nibble(word, row % 8),
        }
    }

    pub(crate) fn scale(&self, row: usize, group: usize) -> f16 {
        f16::from_le_bytes(self.scales[group * self.rows + row])
    }
}

/// A group's number; none has that of a negative one.
fn index(word: [u8; 4]) -> usize {
    usize::try_from(i32::from_le_bytes(word)).unwrap_or(usize::MAX)
}

fn nibble(word: [u8; 4], place: usize) -> u8 {
    word[place / 2] >> (place % 2 * 4) & 15
}

/// GPTQ takes one from each zero point by whole words, so that a zero point of 0 has borrowed from its neighbour.
fn one_more(word: [u8; 4]) -> [u8; 4] {
    u32::from_le_bytes(word).wrapping_add(0x1111_1111).to_le_bytes()
}

/// AWQ interleaves eight outputs so that its kernel unpacks two at a time: even ones lie in the lower half.
fn awq_place(output: usize) -> usize {
    output / 2 + output % 2 * 4
}
