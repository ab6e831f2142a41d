//! What `tc` shows of rules, in a form in which two of them can be compared.

#![expect(clippy::unwrap_used, reason = "a helper of tests")]

/// What `tc filter show` says, without what is particular to one rule (indices, the cookie), and with
/// the keys of a `pedit` that rewrite parts of the same word as one: `tc` makes two where one would do.
pub(crate) fn as_shown(text: &str) -> Vec<String> {
    let mut shown: Vec<String> = Vec::new();
    let mut last_key: Option<(String, u32, u32)> = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] | ["index" | "cookie", ..] => {}
            ["key", _, "at", at, "val", value, "mask", mask] => {
                let hex = |s: &str| u32::from_str_radix(s, 16).unwrap();
                let (mut value, mut mask) = (hex(value), hex(mask));
                if let Some((before, v, m)) = &last_key
                    && before == at
                {
                    (value, mask) = (value | v, mask & m);
                    shown.pop();
                }
                shown.push(format!("{at} val {value:08x} mask {mask:08x}"));
                last_key = Some(((*at).to_owned(), value, mask));
            }
            ["key", _, rest @ ..] => shown.push(rest.join(" ")),
            [.., "pedit", "action", "pipe", "keys", _] => shown.push("pedit pipe".to_owned()),
            _ => shown.push(line.trim_end().to_owned()),
        }
    }
    shown
}
