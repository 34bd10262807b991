import java.io.Reader;
import java.util.Collections;
import java.util.List;
import javax.script.AbstractScriptEngine;
import javax.script.Bindings;
import javax.script.ScriptContext;
import javax.script.ScriptEngine;
import javax.script.ScriptEngineFactory;
import javax.script.SimpleBindings;

/**
 * What SPICE 1.0 takes for a JavaScript engine, so that it runs on a Java that has none (15 or newer).
 *
 * SPICE has JavaScript indent its scores and nothing else: it sets `jsonString`, runs a script that parses and indents
 * it, and reads `result`. This engine hands the string over as it is. Built by
 * `javac --release 8 -g:none SpiceJson.java`; the class lies beside it because users have no compiler.
 */
public final class SpiceJson extends AbstractScriptEngine implements ScriptEngineFactory {
    @Override
    public Object eval(String script, ScriptContext context) {
        Object json = context.getAttribute("jsonString");
        context.setAttribute("result", json, ScriptContext.ENGINE_SCOPE);
        return json;
    }

    @Override
    public Object eval(Reader script, ScriptContext context) {
        return eval("", context);
    }

    @Override
    public List<String> getNames() {
        return Collections.singletonList("JavaScript");
    }

    @Override
    public ScriptEngine getScriptEngine() {
        return this;
    }

    @Override
    public ScriptEngineFactory getFactory() {
        return this;
    }

    @Override
    public Bindings createBindings() {
        return new SimpleBindings();
    }

    @Override
    public List<String> getExtensions() {
        return Collections.emptyList();
    }

    @Override
    public List<String> getMimeTypes() {
        return Collections.emptyList();
    }

    @Override
    public String getEngineName() {
        return "SpiceJson";
    }

    @Override
    public String getEngineVersion() {
        return "1";
    }

    @Override
    public String getLanguageName() {
        return "JavaScript";
    }

    @Override
    public String getLanguageVersion() {
        return "1";
    }

    @Override
    public Object getParameter(String key) {
        return null;
    }

    @Override
    public String getMethodCallSyntax(String object, String method, String... arguments) {
        return null;
    }

    @Override
    public String getOutputStatement(String text) {
        return null;
    }

    @Override
    public String getProgram(String... statements) {
        return null;
    }
}
