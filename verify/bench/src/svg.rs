//! Charts as text: bars that lie, and lines over a few points.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const ROW: f64 = 26.0;
const TOP: f64 = 64.0;

/// Where bars begin, to the right of their names.
const LEFT: f64 = 190.0;

const COLOURS: [&str; 6] = [
    "#2563eb", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#64748b",
];

/// One bar, of one or more parts.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) parts: Vec<f64>,
    /// What stands at its end.
    pub(crate) text: String,
}

/// Values at the points of a line chart; `None` where nothing was measured.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) values: Vec<Option<f64>>,
}

/// Bars, with the names of their parts.
pub(crate) fn bars(title: &str, parts: &[&str], bars: &[Bar]) -> String {
    let sum = |bar: &Bar| bar.parts.iter().sum::<f64>();
    let most = bars.iter().map(sum).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LEFT - 110.0) / most;
    let mut svg = begin(title, TOP + ROW * count(bars.len()) + 12.0);
    if parts.len() > 1 {
        legend(&mut svg, parts);
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * count(index);
        text(&mut svg, LEFT - 8.0, y + 14.0, "end", &bar.name);
        let mut x = LEFT;
        for (part, colour) in bar.parts.iter().zip(COLOURS) {
            let width = (part * scale).max(0.5);
            rectangle(&mut svg, (x, y), (width, ROW - 8.0), colour);
            x += width;
        }
        text(&mut svg, x + 6.0, y + 14.0, "start", &bar.text);
    }
    end(svg)
}

/// Lines over points that stand equally far apart; upwards, each step of the same length is the same
/// factor.
pub(crate) fn lines(title: &str, unit: &str, points: &[String], lines: &[Line]) -> String {
    let (bottom, height) = (TOP + 260.0, 250.0);
    let values = || lines.iter().flat_map(|line| line.values.iter().flatten());
    let least = values().copied().fold(f64::INFINITY, f64::min);
    let most = values().copied().fold(f64::MIN_POSITIVE, f64::max);
    let steps = steps(least, most);
    let (low, high) = (steps[0], steps[steps.len() - 1]);
    let y = |value: f64| bottom - height * (value / low).ln() / (high / low).ln();
    let gap = (WIDTH - 170.0) / count(points.len().max(2) - 1);
    let x = |index: usize| 90.0 + gap * count(index);
    let mut svg = begin(title, bottom + 48.0);
    for step in &steps {
        let at = y(*step);
        let _ = writeln!(
            svg,
            r##"<path d="M70 {at:.1} H{:.1}" stroke="#e2e8f0"/>"##,
            WIDTH - 40.0
        );
        text(&mut svg, 62.0, at + 4.0, "end", &format!("{step}"));
    }
    for (index, point) in points.iter().enumerate() {
        text(&mut svg, x(index), bottom + 20.0, "middle", point);
    }
    text(&mut svg, WIDTH / 2.0, bottom + 40.0, "middle", unit);
    let names: Vec<&str> = lines.iter().map(|line| line.name.as_str()).collect();
    legend(&mut svg, &names);
    for (line, colour) in lines.iter().zip(COLOURS) {
        let places = line.values.iter().enumerate();
        let places = places.filter_map(|(index, value)| Some((x(index), y((*value)?))));
        curve(&mut svg, &places.collect::<Vec<_>>(), colour);
    }
    end(svg)
}

/// 1, 2, 5, 10 and so on, from below the least value to above the greatest.
fn steps(least: f64, most: f64) -> Vec<f64> {
    let all = (-3..9).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
    let all: Vec<f64> = all.collect();
    let from = all.iter().rposition(|step| *step <= least).unwrap_or(0);
    let to = all.iter().position(|step| *step > most);
    all[from..=to.unwrap_or(all.len() - 1)].to_vec()
}

fn begin(title: &str, height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\" fill=\"#0f172a\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\"/>\n"
    );
    let _ = writeln!(
        svg,
        r#"<text x="20" y="28" font-size="16" font-weight="600">{title}</text>"#
    );
    svg
}

fn end(mut svg: String) -> String {
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, names: &[&str]) {
    let mut x = 20.0;
    for (name, colour) in names.iter().zip(COLOURS) {
        rectangle(svg, (x, 40.0), (12.0, 12.0), colour);
        text(svg, x + 18.0, 51.0, "start", name);
        x += 44.0 + 7.2 * count(name.len());
    }
}

fn curve(svg: &mut String, places: &[(f64, f64)], colour: &str) {
    let path: Vec<String> = places
        .iter()
        .map(|(x, y)| format!("{x:.1} {y:.1}"))
        .collect();
    let _ = writeln!(
        svg,
        r#"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2.5"/>"#,
        path.join(" L")
    );
    for (x, y) in places {
        let _ = writeln!(
            svg,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>"#
        );
    }
}

fn rectangle(svg: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
    );
}

#[expect(clippy::cast_precision_loss, reason = "there are few of them")]
fn count(count: usize) -> f64 {
    count as f64
}
