//! Curves as a picture that can be read on a light and on a dark page.

use std::fmt::Write as _;

use crate::curves::Curves;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 56.0;

/// Colours that can be told apart on white and on black, also by most who see few colours (Okabe and Ito).
pub(crate) const COLOURS: [&str; 6] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"];

pub(crate) const STYLE: &str = "\
svg { --paper: #ffffff; --ink: #24292f; --faint: #8c959f; --grid: #d8dee4 }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #e6edf3; --faint: #848d97; --grid: #30363d }
}
.paper { fill: var(--paper) }
.grid { stroke: var(--grid); stroke-width: 1 }
.curve { fill: none; stroke-linejoin: round }
.optimum { stroke: var(--faint); stroke-dasharray: 5 4 }
.optimum-dot { fill: var(--faint) }
text { font: 12px system-ui, sans-serif; fill: var(--ink) }
.title { font-size: 15px; font-weight: 600 }
";

/// Hit shares of blocks over cache sizes, one curve for each policy; sizes on a logarithmic axis.
pub fn draw(curves: &Curves, title: &str) -> String {
    let frame = Frame::around(curves);
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"26\">{title}</text>",
        title = escaped(title),
    );
    frame.grid(&mut svg, &curves.sizes);
    let mut names = Vec::new();
    for (index, curve) in curves.curves.iter().enumerate() {
        let points: Vec<(f64, f64)> = curves
            .sizes
            .iter()
            .zip(&curve.shares)
            .map(|(&size, share)| (frame.x(size), frame.y(share.of_blocks())))
            .collect();
        let colour = (curve.name != "optimum").then(|| COLOURS[index % COLOURS.len()]);
        // The first curve is wide, so that one which runs along it leaves it seen.
        draw_curve(&mut svg, &points, colour, if index == 0 { 4.5 } else { 2.0 });
        if let Some(&(_, y)) = points.last() {
            names.push((y, curve.name.as_str(), fill(colour)));
        }
    }
    draw_names(&mut svg, names, frame.right() + 10.0);
    svg.push_str("</svg>\n");
    svg
}

/// The plane of the plot.
struct Frame {
    first: f64,
    last: f64,
    top: f64,
}

impl Frame {
    fn around(curves: &Curves) -> Frame {
        let log = |size: &u32| f64::from(*size).ln();
        let first = curves.sizes.iter().map(log).fold(f64::INFINITY, f64::min);
        let last = curves.sizes.iter().map(log).fold(f64::NEG_INFINITY, f64::max);
        let shares = curves.curves.iter().flat_map(|curve| &curve.shares);
        let highest = shares.map(|share| share.of_blocks()).fold(curves.infinite.of_blocks(), f64::max);
        Frame {
            first,
            last: if last > first { last } else { first + 1.0 },
            top: (highest * 20.0).ceil() / 20.0,
        }
    }

    fn x(&self, size: u32) -> f64 {
        LEFT + (f64::from(size).ln() - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, share: f64) -> f64 {
        HEIGHT - BOTTOM - share / self.top.max(0.05) * (HEIGHT - TOP - BOTTOM)
    }

    fn right(&self) -> f64 {
        WIDTH - RIGHT
    }

    /// Lines at every twentieth of a share and at every size, with their numbers.
    fn grid(&self, svg: &mut String, sizes: &[u32]) {
        let (right, base) = (self.right(), self.y(0.0));
        for step in 0..=20 {
            let share = f64::from(step) / 20.0;
            if share > self.top + 1e-9 {
                break;
            }
            let y = self.y(share);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
                LEFT - 8.0,
                y + 4.0,
                share * 100.0,
            );
        }
        let mut free_from = f64::NEG_INFINITY;
        for &size in sizes {
            let x = self.x(size);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{base:.1}\"/>"
            );
            if x >= free_from {
                let y = base + 18.0;
                let _ = write!(
                    svg,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
                    thousands(size)
                );
                free_from = x + 58.0;
            }
            svg.push('\n');
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">blocks of 512 tokens in the cache, logarithmic</text>",
            (LEFT + right) / 2.0,
            HEIGHT - 14.0,
        );
    }
}

/// A line through points, with a dot on each; without a colour it is the optimum.
fn draw_curve(svg: &mut String, points: &[(f64, f64)], colour: Option<&str>, width: f64) {
    let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let stroke = match colour {
        Some(colour) => format!("class=\"curve\" stroke=\"{colour}\""),
        None => "class=\"curve optimum\"".to_owned(),
    };
    let _ = writeln!(svg, "<polyline {stroke} stroke-width=\"{width}\" points=\"{}\"/>", line.join(" "));
    for (x, y) in points {
        let _ = writeln!(svg, "<circle {} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"/>", fill(colour));
    }
}

fn fill(colour: Option<&str>) -> String {
    colour.map_or("class=\"optimum-dot\"".to_owned(), |colour| format!("fill=\"{colour}\""))
}

/// Names of curves at their ends, each behind a dot of its colour, pushed apart where they would overlap.
pub(crate) fn draw_names(svg: &mut String, mut names: Vec<(f64, &str, String)>, x: f64) {
    names.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free_from = TOP;
    for (y, name, fill) in names {
        let y = y.max(free_from);
        let _ = writeln!(
            svg,
            "<circle {fill} cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + 4.0,
            x + 14.0,
            y + 4.0,
            escaped(name),
        );
        free_from = y + 15.0;
    }
}

fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_text_are_written_for_readers() {
        assert_eq!([5, 1000, 182_790].map(thousands), ["5", "1,000", "182,790"]);
        assert_eq!(escaped("a<b & c"), "a&lt;b &amp; c");
    }
}
