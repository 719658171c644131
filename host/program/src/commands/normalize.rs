//! The conversion of an argument list into the form that argh parses.
//!
//! argh takes one value per option, which is the next argument. The options of this program may also be written
//! `--option=value`, and its lists as several arguments (`--num-tokens 128 512`).

use std::borrow::Cow;

/// The number of values that an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// None: a switch, or an option that argh will refuse.
    Nothing,
    /// One.
    One,
    /// One or more.
    List,
}

/// Rewrites `args`, which do not include the program's name. `takes` returns the number of values of an option.
/// - `--option=value` becomes `--option value`.
/// - `--list a b` becomes `--list a --list b`. A list ends before an argument that starts with `-` and is no number.
///
/// Everything after a bare `--` stays as it is. An option without its value is an error.
pub(super) fn normalize<'a>(
    args: &'a [String],
    takes: impl Fn(&str) -> Takes,
) -> Result<Vec<Cow<'a, str>>, String> {
    let mut out = Vec::with_capacity(args.len());
    let mut list = None;
    let mut args = args.iter().map(String::as_str).peekable();
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg.into());
            out.extend(args.by_ref().map(Cow::from));
        } else if arg.starts_with("--") {
            let (option, joined) =
                arg.split_once('=').map_or((arg, None), |(option, value)| (option, Some(value)));
            let takes = takes(option);
            list = (takes == Takes::List).then_some(option);
            out.push(option.into());
            if let Some(value) = joined {
                out.push(value.into());
            } else if takes != Takes::Nothing {
                // A value may start with one dash: `--num-tokens -5` is a bad number, not an unknown option.
                let value = args.next_if(|next| !next.starts_with("--"));
                out.push(value.ok_or_else(|| format!("{option}: no value given"))?.into());
            }
        } else {
            if arg.starts_with('-') && !arg[1..].starts_with(|c: char| c.is_ascii_digit()) {
                list = None;
            }
            out.extend(list.map(Cow::from));
            out.push(arg.into());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(line: &str) -> String {
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let takes = |option: &str| match option {
            "--list" | "--other" => Takes::List,
            "--trials" | "--json" => Takes::One,
            _ => Takes::Nothing,
        };
        normalize(&args, takes).map_or_else(|error| error, |args| args.join(" "))
    }

    #[test]
    fn a_list_repeats_its_option() {
        assert_eq!(normalized("bench --list 1 2 3"), "bench --list 1 --list 2 --list 3");
        assert_eq!(normalized("--list 1,2 3 --other a"), "--list 1,2 --list 3 --other a");
        assert_eq!(normalized("--list a b -h"), "--list a --list b -h");
    }

    #[test]
    fn an_equals_sign_separates_an_option_from_its_value() {
        assert_eq!(normalized("--trials=3"), "--trials 3");
        assert_eq!(normalized("--json=a=b"), "--json a=b");
        assert_eq!(normalized("--json=--a"), "--json --a");
        assert_eq!(normalized("--list=1 2"), "--list 1 --list 2");
        assert_eq!(normalized("-x=1 a=b"), "-x=1 a=b");
    }

    #[test]
    fn only_lists_take_several_values() {
        assert_eq!(normalized("--trials 3 4"), "--trials 3 4");
        assert_eq!(normalized("--list 1 --trials 3 4"), "--list 1 --trials 3 4");
        assert_eq!(normalized("--switch 4"), "--switch 4");
    }

    #[test]
    fn a_negative_number_is_a_value() {
        assert_eq!(normalized("--list -5"), "--list -5");
        assert_eq!(normalized("--list 1 -5"), "--list 1 --list -5");
        assert_eq!(normalized("--trials -5"), "--trials -5");
    }

    #[test]
    fn an_option_is_not_taken_for_a_value() {
        assert_eq!(normalized("--list"), "--list: no value given");
        assert_eq!(normalized("--json --trials 3"), "--json: no value given");
        assert_eq!(normalized("--list --help"), "--list: no value given");
    }

    #[test]
    fn nothing_changes_after_two_dashes() {
        assert_eq!(normalized("--list 1 -- --a=b 2"), "--list 1 -- --a=b 2");
    }
}
