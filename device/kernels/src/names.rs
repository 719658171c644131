//! PTX in a form that compresses to a fifth of what it does as it is.
//!
//! Most of a kernel's PTX is the numbers of registers and labels, and hardly any two places have the same ones. Here each number
//! gives way to the count of others that were named since it was named last: that is small, and the same wherever the same thing
//! is done. After `%r`, `!` is the register after the newest one, and `!17` a new one out of order.

use std::collections::HashMap;

/// The text that begins a kernel, which has registers and labels of its own.
const ENTRY: &[u8] = b".entry";
/// The beginning of a label: the number of its function and `_` follow, and then its own number.
const LABEL: &[u8] = b"$L__BB";
/// Stands before a number that was not named before.
const NEW: u8 = b'!';

/// The numbers of one kind of register, or of labels.
#[derive(Default)]
struct Numbers {
    /// All that were named, the latest last.
    named: Vec<u32>,
    newest: u32,
}

impl Numbers {
    /// Writes what stands for `number`.
    fn encode(&mut self, number: u32, to: &mut Vec<u8>) {
        match self.named.iter().rposition(|&named| named == number) {
            Some(at) => {
                to.extend((self.named.len() - 1 - at).to_string().bytes());
                self.named.remove(at);
            }
            None => {
                to.push(NEW);
                if number != self.newest.wrapping_add(1) {
                    to.extend(number.to_string().bytes());
                }
                self.newest = number;
            }
        }
        self.named.push(number);
    }

    /// The number that `digits` stand for, with [`NEW`] before them or not.
    fn decode(&mut self, is_new: bool, digits: &[u8]) -> Option<u32> {
        let number = if is_new {
            self.newest = if digits.is_empty() { self.newest.wrapping_add(1) } else { parse(digits)? };
            self.newest
        } else {
            let at = self.named.len().checked_sub(1)?.checked_sub(parse(digits)? as usize)?;
            self.named.remove(at)
        };
        self.named.push(number);
        Some(number)
    }
}

/// The form of `ptx` that [`decode`] turns back into it; `None` for a text that PTX is not.
pub(crate) fn encode(ptx: &[u8]) -> Option<Vec<u8>> {
    rewrite(ptx, |numbers, rest, to| {
        let digits = digits(rest);
        match rest.first() {
            Some(&NEW) => None,
            _ if digits.is_empty() => Some(0),
            _ => {
                let number = parse(digits).filter(|number| number.to_string().len() == digits.len())?;
                numbers.encode(number, to);
                Some(digits.len())
            }
        }
    })
}

/// The PTX whose form `text` is; `None` if it is no PTX's.
pub(crate) fn decode(text: &[u8]) -> Option<Vec<u8>> {
    rewrite(text, |numbers, rest, to| {
        let (is_new, rest) = rest.strip_prefix(&[NEW]).map_or((false, rest), |rest| (true, rest));
        let digits = digits(rest);
        if is_new || !digits.is_empty() {
            to.extend(numbers.decode(is_new, digits)?.to_string().bytes());
        }
        Some(usize::from(is_new) + digits.len())
    })
}

/// Copies `text`, but for what follows the prefixes of names: `name` gets the numbers of the prefix's kind and the rest of the text, writes
/// what it is to be, and returns the bytes that it stands for.
fn rewrite(
    text: &[u8],
    mut name: impl FnMut(&mut Numbers, &[u8], &mut Vec<u8>) -> Option<usize>,
) -> Option<Vec<u8>> {
    let mut kinds: HashMap<&[u8], Numbers> = HashMap::new();
    let (mut out, mut rest) = (Vec::new(), text);
    while let Some(&byte) = rest.first() {
        let length = match byte {
            b'%' | b'$' => prefix_length(rest),
            b'.' if rest.starts_with(ENTRY) => {
                kinds.clear();
                0
            }
            _ => 0,
        };
        if length == 0 {
            out.push(byte);
            rest = &rest[1..];
            continue;
        }
        let (prefix, after) = rest.split_at(length);
        out.extend(prefix);
        let taken = name(kinds.entry(prefix).or_default(), after, &mut out)?;
        rest = &after[taken..];
    }
    Some(out)
}

/// The length of a name's prefix that `text` begins with: `%rd`, `$L__BB0_`; 0 if it begins with none.
fn prefix_length(text: &[u8]) -> usize {
    match text.strip_prefix(LABEL) {
        Some(rest) => {
            let function = digits(rest).len();
            let is_label = function > 0 && rest.get(function) == Some(&b'_');
            if is_label { LABEL.len() + function + 1 } else { 0 }
        }
        None if text[0] == b'%' => {
            let letters = text[1..].iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
            if letters == 0 { 0 } else { 1 + letters }
        }
        None => 0,
    }
}

/// The digits that `text` begins with.
fn digits(text: &[u8]) -> &[u8] {
    &text[..text.iter().take_while(|byte| byte.is_ascii_digit()).count()]
}

fn parse(digits: &[u8]) -> Option<u32> {
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "\
.visible .entry one(.param .b64 one_param_0)
{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<5>;
	mov.u32 	%r1, %tid.x;
	add.s32 	%r2, %r1, %r1;
	mov.u64 	%rd9, %clock64;
	setp.eq.s32 	%p1, %r2, 7;
	@!%p1 bra 	$L__BB0_2;
	add.s32 	%r4, %r2, %r1;
$L__BB0_2:
	ret;
}
.visible .entry two()
	mov.b32 	%r1, %r7;
";

    #[test]
    fn numbers_give_way_to_how_long_ago_they_were_named() {
        let encoded = encode(PTX.as_bytes()).unwrap();
        let text = str::from_utf8(&encoded).unwrap();
        let lines = [
            "mov.u32 \t%r!, %tid.x",
            "add.s32 \t%r!, %r1, %r0",
            "mov.u64 \t%rd!9, %clock!64",
            "@!%p0 bra \t$L__BB0_!2;",
            "add.s32 \t%r!4, %r1, %r2",
            "$L__BB0_0:",
            "mov.b32 \t%r!, %r!7",
        ];
        for line in lines {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert_eq!(decode(&encoded).unwrap(), PTX.as_bytes());
    }

    #[test]
    fn what_is_no_ptx_is_refused_and_never_changed() {
        for text in
            ["", "%", "$", "%5", "$L__BB_7", "$L__BB12", "%r", "100%", "%r\u{e9}1", ".entry %r3 .entry %r3"]
        {
            assert_eq!(decode(&encode(text.as_bytes()).unwrap()).unwrap(), text.as_bytes());
        }
        for text in ["%r01", "%r!", "%r99999999999"] {
            assert_eq!(encode(text.as_bytes()), None, "{text}");
        }
        for text in ["%r0", "%r!1 %r1", "%r!99999999999", "%r99999999999"] {
            assert_eq!(decode(text.as_bytes()), None, "{text}");
        }
    }
}
