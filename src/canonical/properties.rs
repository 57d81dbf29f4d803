//! Bodies that mean the same are one operation, and bodies that do not never are.

use std::collections::{BTreeMap, HashSet};

use http::Request;
use http::header::CONTENT_TYPE;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use crate::fingerprint::Fingerprinter;

/// A counterexample becomes a test here, not a file.
fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn same(by: &Fingerprinter, one: (&str, &[u8]), two: (&str, &[u8])) -> bool {
    let taken = |(kind, body): (&str, &[u8])| {
        let request = Request::post("/charges").header(CONTENT_TYPE, kind);
        let (parts, ()) = request.body(()).unwrap().into_parts();
        by.fingerprint(&parts, &parts.uri, body)
    };
    taken(one).matches(&taken(two))
}

fn same_json(one: &str, two: &str) -> bool {
    let kind = "application/json";
    let by = Fingerprinter::canonical_json();
    same(&by, (kind, one.as_bytes()), (kind, two.as_bytes()))
}

fn same_form(one: &[u8], two: &[u8]) -> bool {
    let kind = "application/x-www-form-urlencoded";
    let by = Fingerprinter::raw().with_sorted_form();
    same(&by, (kind, one), (kind, two))
}

/// What a JSON text means. A number is its sign, its digits and how many of them are decimals.
#[derive(Debug, Clone, PartialEq)]
enum Meaning {
    Null,
    Bool(bool),
    Number(bool, u64, usize),
    Text(String),
    Array(Vec<Self>),
    Object(BTreeMap<String, Self>),
}

/// Choices made at random while a meaning is spelled.
struct Choices<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl<'a> Choices<'a> {
    fn new(choices: &'a [u8]) -> Self {
        Self(choices.iter().cycle())
    }

    fn of(&mut self, n: usize) -> usize {
        usize::from(*self.0.next().unwrap()) % n
    }

    fn space(&mut self) -> &'static str {
        ["", "", " ", "\n\t", "\r\n  "][self.of(5)]
    }
}

impl Meaning {
    /// One number has one meaning: no decimals that are zero, no negative zero.
    fn number(negative: bool, mut digits: u64, mut decimals: usize) -> Self {
        while decimals > 0 && digits.is_multiple_of(10) {
            (digits, decimals) = (digits / 10, decimals - 1);
        }
        Self::Number(negative && digits > 0, digits, decimals)
    }

    fn spelled(&self, by: &mut Choices<'_>) -> String {
        let (before, after) = (by.space(), by.space());
        let text = match self {
            Self::Null => "null".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Number(negative, digits, decimals) => number(*negative, *digits, *decimals, by),
            Self::Text(text) => string(text, by),
            Self::Array(items) => {
                let items: Vec<_> = items.iter().map(|item| item.spelled(by)).collect();
                format!("[{}]", items.join(","))
            }
            Self::Object(members) => {
                let mut members: Vec<_> = members
                    .iter()
                    .map(|(name, value)| format!("{}:{}", string(name, by), value.spelled(by)))
                    .collect();
                for i in (1..members.len()).rev() {
                    members.swap(i, by.of(i + 1));
                }
                format!("{{{}}}", members.join(","))
            }
        };
        format!("{before}{text}{after}")
    }

    /// Replaces the leaf, or the empty branch, that is `at` steps away.
    fn change(&mut self, at: &mut usize, to: &Self) {
        match self {
            Self::Array(items) if !items.is_empty() => {
                items.iter_mut().for_each(|item| item.change(at, to));
            }
            Self::Object(members) if !members.is_empty() => {
                members.values_mut().for_each(|item| item.change(at, to));
            }
            leaf => match at.checked_sub(1) {
                Some(left) => *at = left,
                None => (*leaf, *at) = (to.clone(), usize::MAX),
            },
        }
    }
}

fn number(negative: bool, digits: u64, decimals: usize, by: &mut Choices<'_>) -> String {
    let digits = format!("{digits:0>width$}", width = decimals + 1);
    let (whole, decimals) = digits.split_at(digits.len() - decimals);
    let zeros = "0".repeat(by.of(16 - digits.len()));
    let dot = if decimals.len() + zeros.len() > 0 {
        "."
    } else {
        ""
    };
    let sign = if negative || digits.trim_matches('0').is_empty() && by.of(2) > 0 {
        "-"
    } else {
        ""
    };
    format!("{sign}{whole}{dot}{decimals}{zeros}")
}

fn string(text: &str, by: &mut Choices<'_>) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        let escaped = || {
            let mut units = [0; 2];
            let units = c.encode_utf16(&mut units).iter();
            units
                .map(|unit| format!("\\u{unit:04x}"))
                .collect::<String>()
        };
        match by.of(4) {
            0 => out.push_str(&escaped()),
            1 => out.push_str(&escaped().to_uppercase().replace('U', "u")),
            _ if c == '/' => out.push_str("\\/"),
            _ if c == '"' || c == '\\' => out.extend(['\\', c]),
            _ if c < ' ' => out.push_str(&escaped()),
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

fn text() -> impl Strategy<Value = String> {
    let any = proptest::char::any();
    let tricky = proptest::sample::select(vec![
        '"',
        '\\',
        '/',
        '~',
        'e',
        '1',
        '.',
        '\u{e9}',
        '\u{ff61}',
        '\u{10000}',
    ]);
    let chars = vec(prop_oneof![any, tricky], 0..6);
    chars.prop_map(|chars| chars.into_iter().collect())
}

fn leaf() -> impl Strategy<Value = Meaning> {
    let small = (any::<bool>(), 0..1000_u64, 0..4_usize);
    let long = (any::<bool>(), 0..1_000_000_000_000_000_u64, 0..14_usize);
    prop_oneof![
        Just(Meaning::Null),
        Just(Meaning::Array(Vec::new())),
        Just(Meaning::Object(BTreeMap::new())),
        any::<bool>().prop_map(Meaning::Bool),
        small.prop_map(|(negative, digits, decimals)| Meaning::number(negative, digits, decimals)),
        long.prop_map(|(negative, digits, decimals)| Meaning::number(negative, digits, decimals)),
        text().prop_map(Meaning::Text),
    ]
}

fn meaning() -> impl Strategy<Value = Meaning> {
    leaf().prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Meaning::Array),
            btree_map(text(), inner, 0..4).prop_map(Meaning::Object),
        ]
    })
}

fn choices() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 1..64)
}

/// Any number at all, as text, and what it means: sign, digits, power of ten.
fn any_number() -> impl Strategy<Value = String> {
    // About as long as a double is exact, and then anything.
    prop_oneof![
        "[1-9][0-9]{13,19}",
        "0\\.[0-9]{13,19}",
        "-?(0|[1-9][0-9]{0,24})(\\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?",
    ]
}

fn value_of(number: &str) -> (bool, String, i64) {
    let (number, power) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let power: i64 = power.parse().unwrap();
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{}{decimals}", whole.trim_start_matches('-'));
    let digits = digits.trim_start_matches('0');
    let short = digits.trim_end_matches('0');
    if short.is_empty() {
        return (false, String::new(), 0);
    }
    let zeros = i64::try_from(digits.len() - short.len()).unwrap();
    let power = power - i64::try_from(decimals.len()).unwrap() + zeros;
    (whole.starts_with('-'), short.to_owned(), power)
}

fn pairs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    // Without brackets: `[]` gives the order of names a meaning.
    let any_byte = || any::<u8>().prop_map(|b| if b == b'[' { b'(' } else { b });
    let byte = || prop_oneof![any_byte(), proptest::sample::select(b"&=+% 0aA".to_vec())];
    vec((vec(byte(), 1..4), vec(byte(), 0..5)), 0..5)
}

fn encoded(pairs: &[(Vec<u8>, Vec<u8>)], by: &mut Choices<'_>) -> Vec<u8> {
    let mut part = |bytes: &[u8]| -> Vec<u8> {
        let encode = |b: &u8| match (*b, by.of(3)) {
            (b' ', 0) => vec![b'+'],
            (b, 1 | 2) if b.is_ascii_alphanumeric() => vec![b],
            (b, 1) => format!("%{b:02x}").into_bytes(),
            (b, _) => format!("%{b:02X}").into_bytes(),
        };
        bytes.iter().flat_map(encode).collect()
    };
    let pairs = pairs
        .iter()
        .map(|(name, value)| [part(name), part(value)].join(&b'='));
    pairs.collect::<Vec<_>>().join(&b'&')
}

/// Pairs of one name keep their order; names have none.
fn by_name(pairs: &[(Vec<u8>, Vec<u8>)]) -> BTreeMap<&[u8], Vec<&[u8]>> {
    let mut names = BTreeMap::<&[u8], Vec<&[u8]>>::new();
    for (name, value) in pairs {
        names.entry(name).or_default().push(value);
    }
    names
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn json_that_means_the_same_is_the_same(json in meaning(), a in choices(), b in choices()) {
        let one = json.spelled(&mut Choices::new(&a));
        let two = json.spelled(&mut Choices::new(&b));
        prop_assert!(same_json(&one, &two), "{one} {two}");
    }

    #[test]
    fn json_with_one_other_leaf_is_another(
        json in meaning(), at in 0..8_usize, to in leaf(), a in choices(), b in choices(),
    ) {
        let mut changed = json.clone();
        changed.change(&mut { at }, &to);
        let one = json.spelled(&mut Choices::new(&a));
        let two = changed.spelled(&mut Choices::new(&b));
        prop_assert_eq!(same_json(&one, &two), json == changed, "{} {}", one, two);
    }

    #[test]
    fn numbers_that_differ_in_one_digit_are_others(
        one in any_number(), back in 0..40_usize, digit in 0..10_u8,
    ) {
        let mut two = one.clone().into_bytes();
        // The last digits are the first to be rounded away.
        let at = (two.len() - 1).saturating_sub(back / 4);
        prop_assume!(two[at].is_ascii_digit());
        two[at] = b'0' + digit;
        let two = String::from_utf8(two).unwrap();
        let means_the_same = value_of(&one) == value_of(&two);
        prop_assert!(means_the_same || !same_json(&one, &two), "{one} {two}");
    }

    #[test]
    fn a_member_that_is_left_out_does_not_matter_wherever_it_is(
        name in text(), inner in text(), rest in btree_map(text(), meaning(), 0..4),
        one in meaning(), two in meaning(), other in leaf(), a in choices(), b in choices(),
    ) {
        let token = |name: &str| name.replace('~', "~0").replace('/', "~1");
        let pointer = format!("/{}/{}", token(&name), token(&inner));
        let by = Fingerprinter::raw().without_member(&pointer).unwrap();
        let spelled = |value: Option<&Meaning>, beside: &Meaning, choices: &[u8]| {
            let mut members = BTreeMap::from([(format!("{inner}+"), beside.clone())]);
            members.extend(value.map(|value| (inner.clone(), value.clone())));
            let mut all = rest.clone();
            all.insert(name.clone(), Meaning::Object(members));
            Meaning::Object(all).spelled(&mut Choices::new(choices))
        };
        let same = |x: &str, y: &str| {
            same(&by, ("application/json", x.as_bytes()), ("application/json", y.as_bytes()))
        };
        let base = spelled(Some(&one), &Meaning::Null, &a);
        prop_assert!(same(&base, &spelled(Some(&two), &Meaning::Null, &b)));
        prop_assert!(same(&base, &spelled(None, &Meaning::Null, &b)));
        let beside = spelled(Some(&one), &other, &b);
        prop_assert_eq!(same(&base, &beside), other == Meaning::Null);
    }

    #[test]
    fn forms_are_the_same_however_they_are_encoded_and_their_names_are_ordered(
        pairs in pairs(), a in choices(), b in choices(),
    ) {
        let mut sorted = pairs.clone();
        sorted.sort_by(|x, y| y.0.cmp(&x.0));
        let one = encoded(&pairs, &mut Choices::new(&a));
        prop_assert!(same_form(&one, &encoded(&sorted, &mut Choices::new(&b))));
    }

    #[test]
    fn forms_with_one_other_byte_are_others(
        pairs in pairs(), at in any::<proptest::sample::Index>(), to in any::<u8>(),
        a in choices(), b in choices(),
    ) {
        let mut changed = pairs.clone();
        let bytes = changed.iter_mut().flat_map(|(name, value)| name.iter_mut().chain(value));
        let mut bytes: Vec<_> = bytes.collect();
        prop_assume!(!bytes.is_empty());
        let at = at.index(bytes.len());
        *bytes[at] = to;
        let one = encoded(&pairs, &mut Choices::new(&a));
        let two = encoded(&changed, &mut Choices::new(&b));
        prop_assert_eq!(same_form(&one, &two), by_name(&pairs) == by_name(&changed));
    }

    #[test]
    fn pairs_of_one_name_that_change_places_make_another_form(
        pairs in vec(("[ab]", "[0-3]{0,1}"), 2..6), at in any::<proptest::sample::Index>(),
        a in choices(),
    ) {
        let bytes = |(name, value): (String, String)| (name.into_bytes(), value.into_bytes());
        let pairs: Vec<_> = pairs.into_iter().map(bytes).collect();
        let mut changed = pairs.clone();
        let at = at.index(pairs.len() - 1);
        changed.swap(at, at + 1);
        let one = encoded(&pairs, &mut Choices::new(&a));
        let two = encoded(&changed, &mut Choices::new(&a));
        prop_assert_eq!(same_form(&one, &two), by_name(&pairs) == by_name(&changed));
    }

    #[test]
    fn forms_with_a_byte_moved_across_a_border_are_others(
        mut pairs in pairs(), at in any::<proptest::sample::Index>(), a in choices(),
    ) {
        prop_assume!(!pairs.is_empty());
        let before = pairs.clone();
        let at = at.index(pairs.len());
        let moved = pairs[at].0.pop();
        pairs[at].1.splice(..0, moved);
        let one = encoded(&before, &mut Choices::new(&a));
        prop_assert!(!same_form(&one, &encoded(&pairs, &mut Choices::new(&a))));
    }
}

#[cfg(feature = "multipart")]
mod multipart {
    use super::*;

    /// The headers of a part, and its content.
    type Part = (Vec<(&'static str, String)>, Vec<u8>);

    fn parts() -> impl Strategy<Value = Vec<Part>> {
        let disposition = (
            "[a-z]{1,3}",
            "(; filename=\"[a-z.]{1,4}\")?",
            "(; filename\\*=UTF-8''[a-z]{1,2})?",
        );
        let disposition = disposition.prop_map(|(name, file, wide)| {
            (
                "content-disposition",
                format!("form-data; name=\"{name}\"{file}{wide}"),
            )
        });
        let others = proptest::sample::subsequence(
            vec![
                ("content-type", "x".to_owned()),
                ("content-transfer-encoding", "y".to_owned()),
            ],
            0..=2,
        );
        let header =
            (disposition, others, "[a-z]{1,2}(/[a-z]{1,2})?").prop_map(|(first, others, value)| {
                let others = others.into_iter().map(|(name, _)| (name, value.clone()));
                std::iter::once(first).chain(others).collect()
            });
        vec((header, vec(any::<u8>(), 0..20)), 1..4)
    }

    fn same_parts(one: (&str, &[Part]), two: (&str, &[Part])) -> bool {
        let [one, two] = [one, two].map(|(boundary, parts)| {
            let mut body = Vec::new();
            for (headers, content) in parts {
                body.extend(format!("--{boundary}\r\n").into_bytes());
                for (name, value) in headers {
                    body.extend(format!("{name}: {value}\r\n").into_bytes());
                }
                body.extend(b"\r\n");
                body.extend(content);
                body.extend(b"\r\n");
            }
            body.extend(format!("--{boundary}--\r\n").into_bytes());
            (format!("multipart/form-data; boundary={boundary}"), body)
        });
        let by = Fingerprinter::raw().with_multipart();
        same(&by, (&one.0, &one.1), (&two.0, &two.1))
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn the_boundary_does_not_matter(
            parts in parts(), one in "[a-zA-Z0-9]{30,40}", two in "[a-zA-Z0-9]{30,40}",
        ) {
            prop_assert!(same_parts((&one, &parts), (&two, &parts)));
        }

        #[test]
        fn another_part_or_header_or_content_is_another_body(
            parts in parts(), other in parts(), at in any::<proptest::sample::Index>(),
            what in 0..5_u8, one in "[a-zA-Z0-9]{30,40}", two in "[a-zA-Z0-9]{30,40}",
        ) {
            let mut changed = parts.clone();
            let (at, from) = (at.index(parts.len()), at.index(other.len()));
            match what {
                0 => changed[at].0.clone_from(&other[from].0),
                4 => changed[at].0.iter_mut().skip(1).for_each(|header| header.1.push('z')),
                1 => changed[at].1.clone_from(&other[from].1),
                2 => drop(changed.remove(at)),
                _ => changed.rotate_left(at),
            }
            prop_assert_eq!(same_parts((&one, &parts), (&two, &changed)), parts == changed);
        }
    }

    #[test]
    fn headers_of_a_part_that_are_not_understood_matter() {
        let part = |kind: &str| {
            let disposition = ("content-disposition", "form-data; name=\"a\"".to_owned());
            vec![(
                vec![disposition, ("content-type", kind.to_owned())],
                b"x".to_vec(),
            )]
        };
        assert!(same_parts(("one", &part("image")), ("two", &part("image"))));
        assert!(!same_parts(
            ("one", &part("image")),
            ("two", &part("video"))
        ));
    }
}

#[test]
fn parameters_of_a_content_type_matter_unless_they_name_the_usual_charset() {
    let by = Fingerprinter::canonical_json().with_sorted_form();
    let same = |one: &str, two: &str| same(&by, (one, b"1"), (two, b"1"));
    assert!(same("application/json", "application/json; charset=UTF-8"));
    assert!(!same("application/json; v=1", "application/json; v=2"));
    let form = "application/x-www-form-urlencoded";
    assert!(same(form, &format!("{form};charset=utf-8")));
    assert!(!same(form, &format!("{form};charset=latin1")));
}

#[test]
fn the_values_that_the_tests_of_numbers_compare_are_right() {
    assert_eq!(value_of("-10.50e2"), value_of("-1050"));
    assert_eq!(value_of("0.0"), value_of("-0e7"));
    let all = ["1", "-1", "10", "0.1", "1e2"].map(value_of);
    assert_eq!(HashSet::from(all).len(), 5);
}
