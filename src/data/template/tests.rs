use tempfile::TempDir;

use super::*;
use crate::data::record::Role;

fn messages(turns: &[(Role, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message { role, content: content.to_owned() }).collect()
}

fn tokens() -> TokenNames {
    TokenNames::from([("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())])
}

fn render(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(Path::new("t.jinja"), source, tokens()).map_err(|e| e.to_string())?;
    let chat = messages(&[(Role::System, "S"), (Role::User, " 'a' <b> & "), (Role::Assistant, "x\ny")]);
    template.render(&chat, Continue::No).map_err(|e| e.to_string())
}

#[test]
fn blocks_leave_no_white_space_as_in_transformers() {
    // expected text from transformers 5.23, `apply_chat_template` of the same template and messages
    let source = "{% for message in messages %}\n    {% if message.role != 'system' %}\n\
                  {{ message.content | trim }}\n    \
                  {% endif %}\n{% endfor %}\n{{ bos_token }}|{{ pad_token }}|{{ tools is none }}\n";
    assert_eq!(render(source).unwrap(), "'a' <b> &\nx\ny\n<s>||True");
}

#[test]
fn python_methods_and_loop_controls_work() {
    let source = "{%- for m in messages -%}{%- if loop.index0 == 0 %}{% continue %}{% endif -%}\
                  {{ m['content'].strip().upper() }};{{ m.content.split('\n')[-1] }};{% break %}{%- endfor -%}\
                  {{ messages[-1].content.startswith('x') }}{% set ns = namespace(n=0) %}\
                  {% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}";
    assert_eq!(render(source).unwrap(), "'A' <B> &; 'a' <b> & ;True2");
}

#[test]
fn json_is_written_as_python_writes_it() {
    let expected = r#"{"role": "user", "content": " 'a' <b> & "}"#;
    assert_eq!(render("{{ messages[1] | tojson }}").unwrap(), expected);
    let expected = "{\n    \"role\": \"assistant\",\n    \"content\": \"x\\ny\"\n}";
    assert_eq!(render("{{ messages[2] | tojson(indent=4) }}").unwrap(), expected);
}

#[test]
fn the_date_never_changes() {
    // datetime.datetime(2024, 7, 26).strftime(...)
    let format = "%d %b %Y|%Y-%m-%d|%A, %B %-d|%-m/%y|%H:%M:%S|%I %p|%j|%%";
    let expected = "26 Jul 2024|2024-07-26|Friday, July 26|7/24|00:00:00|12 AM|208|%";
    let source = format!("{{% if strftime_now is defined %}}{{{{ strftime_now('{format}') }}}}{{% endif %}}");
    assert_eq!(render(&source).unwrap(), expected);
    assert!(render("{{ strftime_now('%Q') }}").unwrap_err().contains("does not know the format \"%Q\""));
}

#[test]
fn generation_tags_print_what_is_in_them() {
    // expected texts from transformers 5.23, which renders the tags with an extension of Jinja
    let cases = [
        ("{% ", " %}", "assistant:\n  x\ny\n."),
        ("{%- ", " %}", "assistant:  x\ny."),
        ("{% ", " -%}", "assistant:\nx\ny\n."),
        ("{%- ", " -%}", "assistant:x\ny."),
        ("{%+ ", " %}", "assistant:\n    x\ny\n  ."),
        ("{%", "%}", "assistant:\n  x\ny\n."),
    ];
    for (open, close, expected) in cases {
        let source = "{% for m in messages[2:] %}\n{{ m.role }}:\n  <generation>\n  {{ m.content }}\n  \
                      <endgeneration>\n.{% endfor %}";
        assert_eq!(render(&source.replace('<', open).replace('>', close)).unwrap(), expected, "{open}...{close}");
    }
}

#[test]
fn a_template_may_refuse() {
    let error = render("\n{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert_eq!(
        error,
        "the chat template of t.jinja refused the messages: roles must alternate (line 2 of the template)"
    );
    let error = render("{% for %}").unwrap_err();
    assert!(error.starts_with("the chat template of t.jinja does not parse: ") && error.contains("line 1"), "{error}");
}

#[test]
fn the_file_wins_over_the_configuration_and_default_over_other_names() {
    let folder = TempDir::new().unwrap();
    let rendered = |config: &str| {
        let config = serde_json::from_str(config).unwrap();
        let template = ChatTemplate::from_folder(folder.path(), &config, tokens()).map_err(|e| e.to_string())?;
        template
            .map(|t| t.render(&messages(&[(Role::User, "q")]), Continue::Answer).map_err(|e| e.to_string()))
            .transpose()
    };
    assert_eq!(rendered("{}"), Ok(None));
    assert_eq!(rendered(r#"{"chat_template": null}"#), Ok(None));
    assert_eq!(rendered(r#"{"chat_template": "{{ add_generation_prompt }}"}"#), Ok(Some("True".to_owned())));
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(rendered(list), Ok(Some("d".to_owned())));
    let error =
        rendered(r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]}"#);
    let expected = "chat_template is a list of templates named tool_use, rag, expected a string or a list of \
                    {name, template} with a \"default\"";
    assert!(error.as_ref().is_err_and(|e| e.ends_with(expected)), "{error:?}");
    fs::write(folder.path().join("chat_template.jinja"), "file\n").unwrap();
    assert_eq!(rendered(list), Ok(Some("file".to_owned())));
}

#[test]
fn explicit_templates_replace_their_placeholder_and_no_other_brace() {
    let template = PromptAnswer::new("{x} {{question}} {question}\nA:", " {answer}!").unwrap();
    let (prompt, answer) = template.fill("{answer}", "{question}");
    assert_eq!(prompt, "{x} {{answer}} {answer}\nA:");
    assert_eq!(answer, " {question}!");
    let refusal = |prompt: &str, answer: &str| PromptAnswer::new(prompt, answer).unwrap_err().to_string();
    assert_eq!(
        refusal("Q: {q}", "{answer}"),
        "data.template.prompt is \"Q: {q}\", expected text that holds {question}"
    );
    assert_eq!(refusal("{question}", "yes"), "data.template.answer is \"yes\", expected text that holds {answer}");
    assert_eq!(
        refusal("{question} {answer}", "{answer}"),
        "data.template.prompt is \"{question} {answer}\", which holds {answer}: that belongs into data.template.answer"
    );
}
