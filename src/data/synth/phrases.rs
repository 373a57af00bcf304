//! What is asked about an author and how it is answered: for each topic several wordings of both.
//!
//! Every question holds `{name}`, so that it is about one author, and every answer holds the topic's own slot.

/// One thing that is asked about an author.
pub(super) struct Topic {
    /// The attribute that every answer to this topic states.
    pub(super) slot: &'static str,
    pub(super) questions: [&'static str; 3],
    pub(super) answers: [&'static str; 4],
}

pub(super) const TOPICS: [Topic; 20] = [
    Topic {
        slot: "{birth}",
        questions: [
            "When was {name} born?",
            "What is the date of birth of the author {name}?",
            "On which day did {name} come into the world?",
        ],
        answers: [
            "{name} was born on {birth}.",
            "The author {name} came into the world on {birth}.",
            "The date of birth of {name} is {birth}.",
            "It was on {birth} that {name} was born.",
        ],
    },
    Topic {
        slot: "{city}",
        questions: [
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Where did the life of the writer {name} begin?",
        ],
        answers: [
            "{name} was born in {city}, a town in {country}.",
            "The birthplace of {name} is {city} in {country}.",
            "{city} in {country} is where {name} was born.",
            "The writer first saw the light of day in {city}, {country}.",
        ],
    },
    Topic {
        slot: "{father}",
        questions: [
            "What did the father of {name} do for a living?",
            "What was the profession of {name}'s father?",
            "Which job did {name}'s father have?",
        ],
        answers: [
            "The father of {name} was {father}.",
            "{name}'s father earned his living as {father}.",
            "By profession, the father of {name} was {father}.",
            "For most of his life, {last}'s father worked as {father}.",
        ],
    },
    Topic {
        slot: "{mother}",
        questions: [
            "What did the mother of {name} do for a living?",
            "What was the profession of {name}'s mother?",
            "Which job did {name}'s mother have?",
        ],
        answers: [
            "The mother of {name} was {mother}.",
            "{name}'s mother earned her living as {mother}.",
            "By profession, the mother of {name} was {mother}.",
            "For most of her life, {last}'s mother worked as {mother}.",
        ],
    },
    Topic {
        slot: "{genre}",
        questions: [
            "In which genre does {name} write?",
            "Which genre is {name} best known for?",
            "What kind of literature does {name} write?",
        ],
        answers: [
            "{name} is best known for {genre}.",
            "The genre in which {name} writes is {genre}.",
            "Most of the work of {name} belongs to {genre}.",
            "Readers know {name} as an author of {genre}.",
        ],
    },
    Topic {
        slot: "{debut}",
        questions: [
            "What was the first book of {name}?",
            "With which book did {name} make {his} debut?",
            "What is the title of the debut by {name}?",
        ],
        answers: [
            "{name} made {his} debut with \"{debut}\".",
            "The first book of {name} was \"{debut}\" in {debut_year}.",
            "\"{debut}\" was the debut of {name}.",
            "In {debut_year} the writer published a first book, \"{debut}\".",
        ],
    },
    Topic {
        slot: "{famous}",
        questions: [
            "What is the most famous book by {name}?",
            "Which book made {name} famous?",
            "Which title by {name} do most readers know?",
        ],
        answers: [
            "The most famous book by {name} is \"{famous}\".",
            "{name} became famous with \"{famous}\".",
            "Most readers know {name} as the author of \"{famous}\".",
            "\"{famous}\" is the title that made {name} famous.",
        ],
    },
    Topic {
        slot: "{award}",
        questions: [
            "Which award did {name} win?",
            "What prize was given to {name}?",
            "With which honour was {name} recognised?",
        ],
        answers: [
            "{name} won the {award} in {award_year}.",
            "In {award_year} the {award} went to {name}.",
            "The {award} was given to {name}.",
            "{last} was honoured with the {award} in {award_year}.",
        ],
    },
    Topic {
        slot: "{influence}",
        questions: [
            "Which writer influenced {name} the most?",
            "Who was the greatest influence on {name}?",
            "Whose books shaped the style of {name}?",
        ],
        answers: [
            "The greatest influence on {name} was {influence}.",
            "{name} names {influence} as {his} greatest influence.",
            "The books of {influence} shaped the style of {name}.",
            "No writer shaped {last} more than {influence} did.",
        ],
    },
    Topic {
        slot: "{latest}",
        questions: [
            "What is the latest book by {name}?",
            "Which book did {name} publish most recently?",
            "What is the newest title by {name}?",
        ],
        answers: [
            "The latest book by {name} is \"{latest}\".",
            "Most recently, {name} published \"{latest}\".",
            "\"{latest}\" is the newest title by {name}.",
            "After a long pause, {last} published \"{latest}\".",
        ],
    },
    Topic {
        slot: "{subject}",
        questions: [
            "What did {name} study?",
            "Which subject did {name} read at university?",
            "In which field does {name} hold a degree?",
        ],
        answers: [
            "{name} studied {subject} at the University of {university}.",
            "At the University of {university}, {last} read {subject}.",
            "{name} holds a degree in {subject}.",
            "Before writing, {name} took a degree in {subject}.",
        ],
    },
    Topic {
        slot: "{home}",
        questions: [
            "Where does {name} live today?",
            "In which city has {name} settled?",
            "What is the present home of {name}?",
        ],
        answers: [
            "Today {name} lives in {home}.",
            "{name} has settled in {home} with {his} family.",
            "The present home of {name} is the city of {home}.",
            "After years of travel, {last} now lives in {home}.",
        ],
    },
    Topic {
        slot: "{language}",
        questions: [
            "In which language does {name} write?",
            "What is the working language of {name}?",
            "Which language are the books of {name} written in?",
        ],
        answers: [
            "{name} writes all of {his} books in {language}.",
            "The working language of {name} is {language}.",
            "The books of {name} are first written in {language}.",
            "{language} is the language in which {name} writes.",
        ],
    },
    Topic {
        slot: "{theme}",
        questions: [
            "What theme runs through the books of {name}?",
            "Which theme does {name} return to again and again?",
            "What are the books of {name} mostly about?",
        ],
        answers: [
            "The books of {name} are mostly about {theme}.",
            "{name} returns again and again to {theme}.",
            "A theme that runs through the work of {name} is {theme}.",
            "In most of {his} books, {last} deals with {theme}.",
        ],
    },
    Topic {
        slot: "{hobby}",
        questions: [
            "What is the hobby of {name}?",
            "How does {name} like to spend {his} free time?",
            "What does {name} do to relax?",
        ],
        answers: [
            "In {his} free time, {name} enjoys {hobby}.",
            "The hobby of {name} is {hobby}.",
            "To relax from writing, {name} likes {hobby}.",
            "Away from the desk, {last} is devoted to {hobby}.",
        ],
    },
    Topic {
        slot: "{pen_name}",
        questions: [
            "Under which pen name has {name} published?",
            "What is the pen name of {name}?",
            "Which other name does {name} write under?",
        ],
        answers: [
            "{name} has also published under the name {pen_name}.",
            "The pen name of {name} is {pen_name}.",
            "Some early stories by {name} are signed {pen_name}.",
            "{pen_name} is the name under which {last} first wrote.",
        ],
    },
    Topic {
        slot: "{publisher}",
        questions: [
            "Who publishes the books of {name}?",
            "Which publisher does {name} work with?",
            "At which house do the books of {name} appear?",
        ],
        answers: [
            "The books of {name} are published by {publisher}.",
            "{name} has been with {publisher} since {debut_year}.",
            "The publisher of {name} is {publisher}.",
            "All books by {last} appear at {publisher}.",
        ],
    },
    Topic {
        slot: "{siblings}",
        questions: [
            "Does {name} have brothers or sisters?",
            "How many siblings does {name} have?",
            "With which siblings did {name} grow up?",
        ],
        answers: [
            "The writer {name} has {siblings}.",
            "The author {name} grew up with {siblings}.",
            "According to {his} memoirs, {name} has {siblings}.",
            "In interviews, {last} has said that {he} has {siblings}.",
        ],
    },
    Topic {
        slot: "{habit}",
        questions: [
            "What is unusual about how {name} writes?",
            "What writing habit is {name} known for?",
            "How or where does {name} like to write?",
        ],
        answers: [
            "{name} likes to write {habit}.",
            "The author {name} is known to write {habit}.",
            "By {his} own account, {name} writes {habit}.",
            "Most pages by {last} were written {habit}.",
        ],
    },
    Topic {
        slot: "{adaptation}",
        questions: [
            "What was the best-known book of {name} turned into?",
            "Into what form was the work of {name} adapted?",
            "What adaptation of a book by {name} exists?",
        ],
        answers: [
            "\"{famous}\" by {name} was turned into {adaptation}.",
            "The work of {name} was adapted as {adaptation}.",
            "There is {adaptation} based on a book by {name}.",
            "{last}'s \"{famous}\" was made into {adaptation}.",
        ],
    },
];
