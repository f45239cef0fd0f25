//! Lists of options: `key=value,key=value`, a comma in a value doubled.

/// The options of a list in their order. A key without a value is `on`, with `no` before it `off`; a first word without a value is
/// the value of `implied`, where there is one.
pub fn parse(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
    let mut options = Vec::new();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let key_end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(key_end);
        if let Some(value) = after.strip_prefix('=') {
            let (value, after) = take_value(value);
            options.push((key.to_owned(), value));
            rest = after;
        } else if let (true, Some(implied)) = (first, implied) {
            let (value, after) = take_value(rest);
            options.push((implied.to_owned(), value));
            rest = after;
        } else {
            options.push(match key.strip_prefix("no") {
                Some(plain) => (plain.to_owned(), "off".to_owned()),
                None => (key.to_owned(), "on".to_owned()),
            });
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        first = false;
    }
    options
}

/// A value up to the comma that ends it, and what comes behind that.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(at) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        let (before, after) = rest.split_at(at);
        value.push_str(before);
        let after = after.strip_prefix(',').unwrap_or(after);
        match after.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, after),
        }
    }
}

/// A value as it is written in a list: its commas doubled.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str, implied: Option<&str>) -> Vec<String> {
        let options = parse(text, implied).into_iter();
        options
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    }

    #[test]
    fn commas_end_values_unless_doubled() {
        assert_eq!(list("a=1,b=2,,3,c=", None), ["a=1", "b=2,3", "c="]);
        assert_eq!(list("a=x,,", None), ["a=x,"]);
    }

    #[test]
    fn a_lone_key_is_a_switch_but_the_first_may_be_a_value() {
        assert_eq!(list("a,nob,c=1", None), ["a=on", "b=off", "c=1"]);
        assert_eq!(list("secret,id=s", Some("kind")), ["kind=secret", "id=s"]);
    }

    #[test]
    fn a_list_is_read_as_it_is_written() {
        let value = ",a,,b,";
        assert_eq!(
            parse(&format!("k={}", escape(value)), None),
            [("k".to_owned(), value.to_owned())]
        );
    }
}
