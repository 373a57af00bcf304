//! Text and numbers in HTML. Everything is well-formed XML as well, so that a test can parse it.

/// Text as content or attribute value.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no place for other control characters, escaped or not
            c if c.is_control() && !matches!(c, '\n' | '\t') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A folded part.
pub(super) fn folded(title: &str, content: &str) -> String {
    format!("<details><summary>{}</summary>{content}</details>\n", escape(title))
}

/// Four digits behind the point, or a power of ten where those would be zeros or too many.
pub(super) fn number(x: f64) -> String {
    let size = x.abs();
    if size != 0.0 && size < 1e-3 {
        power_of_ten(x, 1)
    } else if size >= 1e6 {
        power_of_ten(x, 2)
    } else if size >= 1000.0 {
        format!("{x:.0}")
    } else if size >= 10.0 {
        format!("{x:.2}")
    } else {
        format!("{x:.4}")
    }
}

/// A power of ten as on a log axis.
pub(super) fn decade(exponent: f64) -> String {
    if (-2.0..=4.0).contains(&exponent) {
        format!("{}", 10f64.powf(exponent))
    } else {
        power_of_ten(10f64.powf(exponent), 0)
    }
}

/// A p-value, also one that is too small for a number.
pub(super) fn p_value(p: f64, log10: f64) -> String {
    if p > 0.0 { number(p) } else { format!("10{}", raised(&format!("{:.0}", log10.floor()))) }
}

/// As on an axis: no more digits than the step between ticks asks for.
pub(super) fn tick(x: f64, step: f64) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if x.abs() >= 1e5 || x.abs() < 1e-4 {
        return power_of_ten(x, 0);
    }
    let digits = (-(step.log10() + 1e-9).floor()).max(0.0) as usize;
    // 0.25 is a round step of two digits
    let digits = digits + usize::from((step * 10f64.powi(digits as i32)).fract() > 1e-6);
    format!("{x:.digits$}")
}

/// `1.2 × 10⁻⁵`, or `10⁻⁵`.
fn power_of_ten(x: f64, digits: usize) -> String {
    let text = format!("{x:.digits$e}");
    let (mantissa, exponent) = text.split_once('e').expect("invariant: this format has an exponent");
    let raised = raised(exponent);
    if digits == 0 && mantissa == "1" { format!("10{raised}") } else { format!("{mantissa} × 10{raised}") }
}

fn raised(exponent: &str) -> String {
    exponent.chars().map(superscript).collect()
}

fn superscript(c: char) -> char {
    match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        digit => char::from_u32('⁰' as u32 + digit.to_digit(10).unwrap_or(0)).unwrap_or('⁰'),
    }
}

/// Unit: bytes in, words out.
pub(super) fn bytes(x: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (x.max(1.0).log2() / 10.0).floor().min(4.0);
    format!("{:.1} {}", x / 1024f64.powf(power), units[power as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_show_what_counts() {
        let cases = [
            (0.0, "0.0000"),
            (0.98765, "0.9877"),
            (0.0066, "0.0066"),
            (-12.345, "-12.35"),
            (1234.5, "1234"),
            (1.234e-5, "1.2 × 10⁻⁵"),
            (1.06e-239, "1.1 × 10⁻²³⁹"),
            (2.5e7, "2.50 × 10⁷"),
        ];
        for (x, want) in cases {
            assert_eq!(number(x), want);
        }
        let ticks = [(0.0, 0.5, "0"), (0.25, 0.25, "0.25"), (0.5, 0.25, "0.50"), (0.2, 0.1, "0.2"), (40.0, 20.0, "40")];
        for (x, step, want) in ticks {
            assert_eq!(tick(x, step), want);
        }
        assert_eq!(tick(1e-5, 1e-5), "10⁻⁵");
        assert_eq!([p_value(0.0286, -1.54), p_value(0.0, -400.3)], ["0.0286", "10⁻⁴⁰¹"]);
        assert_eq!([-5.0, -2.0, 0.0, 4.0, 5.0].map(decade), ["10⁻⁵", "0.01", "1", "10000", "10⁵"]);
        assert_eq!(bytes(3.5 * 1024.0 * 1024.0), "3.5 MiB");
    }

    #[test]
    fn nothing_in_a_text_becomes_markup() {
        assert_eq!(escape("<b a=\"1\">&\u{1}\n"), "&lt;b a=&quot;1&quot;&gt;&amp;\u{fffd}\n");
    }
}
