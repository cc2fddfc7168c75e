//! How long requests waited, as a picture: for each order, which share of them had what by when.

use std::fmt::Write as _;

use crate::comparison::Comparison;
use crate::serve::{Report, Served};
use crate::svg::{COLOURS, STYLE, draw_names, escaped};

const WIDTH: f64 = 940.0;
const HEIGHT: f64 = 400.0;
const TOP: f64 = 64.0;
const BASE: f64 = 340.0;

/// Two panels, time to the first token and time per token, on logarithmic axes.
pub fn draw(comparison: &Comparison, title: &str) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"title\" x=\"56\" y=\"26\">{title}</text>\n",
        title = escaped(title),
    );
    Panel {
        left: 56.0,
        right: 404.0,
        name: "time to first token",
        value: |served| Some(served.first - served.arrived),
    }
    .draw(&mut svg, comparison);
    Panel { left: 460.0, right: 808.0, name: "time per token", value: Served::per_token }
        .draw(&mut svg, comparison);
    let names = comparison.runs.iter().enumerate();
    let names =
        names.map(|(index, (name, _, _))| (TOP, name.as_str(), format!("fill=\"{}\"", colour(index))));
    draw_names(&mut svg, names.collect(), 828.0);
    svg.push_str("</svg>\n");
    svg
}

struct Panel {
    left: f64,
    right: f64,
    name: &'static str,
    value: fn(&Served) -> Option<f64>,
}

/// Shares of requests at which a curve has a point, in percent.
const POINTS: std::ops::RangeInclusive<u32> = 0..=100;

/// Less than this is drawn as this.
const SECONDS_MIN: f64 = 1e-4;

impl Panel {
    fn draw(&self, svg: &mut String, comparison: &Comparison) {
        let curves: Vec<Vec<f64>> =
            comparison.runs.iter().map(|(_, report, _)| self.quantiles(report)).collect();
        let all = || curves.iter().flatten().copied();
        let first = all().fold(f64::INFINITY, f64::min).log10().floor();
        let last = all().fold(SECONDS_MIN, f64::max).log10().ceil().max(first + 1.0);
        if !first.is_finite() {
            return;
        }
        let x =
            |seconds: f64| self.left + (seconds.log10() - first) / (last - first) * (self.right - self.left);
        self.grid(svg, first, last, x);
        for (index, curve) in curves.iter().enumerate() {
            let points = curve
                .iter()
                .zip(POINTS)
                .map(|(&seconds, percent)| format!("{:.1},{:.1}", x(seconds), y(f64::from(percent))));
            let _ = writeln!(
                svg,
                "<polyline class=\"curve\" stroke=\"{}\" stroke-width=\"2\" points=\"{}\"/>",
                colour(index),
                points.collect::<Vec<_>>().join(" ")
            );
        }
    }

    fn quantiles(&self, report: &Report) -> Vec<f64> {
        let served = report.requests.iter().filter(|served| served.tokens > 0);
        let mut values: Vec<f64> =
            served.filter_map(self.value).map(|seconds| seconds.max(SECONDS_MIN)).collect();
        values.sort_by(f64::total_cmp);
        let Some(last) = values.len().checked_sub(1) else { return Vec::new() };
        POINTS.map(|percent| values[last * percent as usize / 100]).collect()
    }

    /// Lines at every power of ten and every fifth of the requests.
    fn grid(&self, svg: &mut String, first: f64, last: f64, x: impl Fn(f64) -> f64) {
        let Panel { left, right, name, .. } = self;
        for percent in (0..=100u32).step_by(20) {
            let y = y(f64::from(percent));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{percent} %</text>",
                left - 8.0,
                y + 4.0
            );
        }
        let mut power = first;
        while power <= last {
            let seconds = 10f64.powf(power);
            let label = if power < 0.0 { format!("{:.3} ms", seconds * 1e3) } else { format!("{seconds} s") };
            let label = label.replace(".000 ", " ").replace(".100 ", ".1 ");
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{0:.1}\" y1=\"{TOP}\" x2=\"{0:.1}\" y2=\"{BASE}\"/>\
                 <text x=\"{0:.1}\" y=\"{1:.1}\" text-anchor=\"middle\">{label}</text>",
                x(seconds),
                BASE + 18.0
            );
            power += 1.0;
        }
        let middle = (left + right) / 2.0;
        let y = BASE + 40.0;
        let _ = writeln!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">\
             {name}: share of requests that had no more</text>"
        );
    }
}

fn y(percent: f64) -> f64 {
    BASE - percent / 100.0 * (BASE - TOP)
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}
